"""Gathering: any rows, in any order, from a Zarr array's shards into a caller's buffer.

Guarantees: `out[i]` is the stored sample of (rows[i], views[i]) bit for bit, or an error that names the shard and the
row; a row that was left empty is an error, never zeros. Open files are bounded, so a store of any number of shards is
read under the usual limit of 1,024. The reader may be used from several threads, survives a fork (of a directory's
reader) and pickles (a worker process opens its own files).

Costs: a row is one range of one `preadv` straight into the caller's memory, which releases the GIL; rows that touch in
the file are read by one call. What is kept does not grow with the epochs: nine bytes a shard, a bit a chunk that
was checked, and three bounded caches (open files, irregular shard indexes, checksums from receipts). What is
checked, and when, is in `checks.py`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from storage.base.errors import StoreError
from storage.cache import DiskCache
from storage.checks import ChecksumPolicy, ChunkChecks, sample_at
from storage.layout import CRC_BYTES, EMPTY, ArrayLayout, GroupLayout, StoreLayout, checked_rows
from storage.read import Check, Read, ReadError
from storage.roots import Root
from storage.shard import HEAL, parse_shard_index
from storage.shard_files import LocalFiles, RemoteFiles, ShardFiles

EmptyRows = Literal["refuse", "fill"]
MAX_MERGED_BYTES = 16 << 20  # a longer run is cut, so that threads share it
MAX_MERGED_CHUNKS = 512  # half of what one preadv takes, as each chunk is followed by its checksum
MIN_SHARE_BYTES = 1 << 19  # less than this is not worth waking another thread for
CALL_BYTES = 1 << 14  # what one thread copies while it calls the kernel once
INDEX_BYTES_KEPT = 16 << 20  # irregular ones, 8 bytes a chunk

UNKNOWN, REGULAR, IRREGULAR = 0, 1, 2  # what is known of a shard's index

Piece = Callable[[], None]


def gather_into(
    targets: Sequence[tuple[ArrayReader, np.ndarray]], rows: np.ndarray | Sequence[int], views: np.ndarray | int
) -> None:
    """The same rows of several arrays at once, such as moments and patches: `ArrayReader.read_into` for each target.

    Quicker than one after the other: threads are woken once, each with its share of the whole.
    """
    if not targets:
        return
    places: dict[StoreLayout, Places] = {}
    for reader, _ in targets:
        reader._start_if_forked()
        if reader._layout.store not in places:
            places[reader._layout.store] = Places.of(rows, views, reader._layout)
    first = targets[0][0]
    waiting: list[list[Piece]] = []  # on a network: begun first, and none behind another
    for reader, out in targets:
        if not reader._files.by_bytes:
            where = places[reader._layout.store]
            n_pieces = max(1, min(len(where.order), reader._n_threads))
            cuts = [i / n_pieces for i in range(n_pieces + 1)]
            waiting += [[piece] for piece in reader._pieces(where, out, cuts)]
    shares = _shares([target for target in targets if target[0]._files.by_bytes], places)
    first._together(_call, [*waiting, *shares], first._n_threads)


def _shares(
    targets: Sequence[tuple[ArrayReader, np.ndarray]], places: Mapping[StoreLayout, Places]
) -> list[list[Piece]]:
    """Lists of pieces that cost alike, one a thread.

    All rows of the array of the shortest rows come first, then the next array's, and the whole is cut. So while one
    thread reads short rows, for which it takes Python's lock again and again, the others read long ones and seldom want
    it.
    """
    if not targets:
        return []
    n_bytes = sum(out.nbytes for _, out in targets)
    n_rows = sum(len(places[reader._layout.store].order) for reader, _ in targets)
    n_shares = max(1, min(targets[0][0]._n_threads, n_bytes // MIN_SHARE_BYTES, n_rows))
    shares: list[list[Piece]] = [[] for _ in range(n_shares)]
    targets = sorted(targets, key=lambda target: target[0]._layout.chunk_bytes)
    costs = [out.nbytes + CALL_BYTES * len(places[reader._layout.store].order) for reader, out in targets]
    total, before = sum(costs), 0
    for (reader, out), cost in zip(targets, costs, strict=True):
        cuts = [min(1.0, max(0.0, (total * i / n_shares - before) / max(1, cost))) for i in range(n_shares + 1)]
        pieces = reader._pieces(places[reader._layout.store], out, cuts)
        for share, piece in zip(shares, pieces, strict=True):
            share.append(piece)
        before += cost
    return shares


def _call(pieces: list[Piece]) -> None:
    for piece in pieces:
        piece()


class Places(NamedTuple):
    """Where a batch's samples lie, in the order of the disk: the same for every array of a store."""

    units: np.ndarray  # int64 (B,)
    slots: np.ndarray  # int64 (B,), chunks of the shard
    order: np.ndarray  # int64 (B,), positions in the caller's batch
    merge: bool  # whether most of them are neighbours; a few are not worth looking for

    @classmethod
    def of(cls, rows: np.ndarray | Sequence[int], views: np.ndarray | int, layout: ArrayLayout) -> Places:
        """Raises ValueError and IndexError for what are no rows or views of the array."""
        rows, views = checked_rows(rows, views, layout.shape)
        chunks = rows * layout.store.n_views + views  # counted through all shards
        order = np.argsort(chunks, kind="stable")
        chunks = chunks[order]
        units, slots = np.divmod(chunks, layout.n_shard_chunks)
        n_neighbours = int(np.count_nonzero(chunks[1:] - chunks[:-1] == 1))
        return cls(units, slots, order, merge=2 * n_neighbours >= len(order))


class ArrayReader:
    """One array of a group, read by rows. `shape`, `dtype` and `row_shape` describe it; made by `GroupReader`."""

    def __init__(
        self,
        root: Root,
        group: GroupLayout | None,
        layout: ArrayLayout,
        *,
        path: str,
        checksums: ChecksumPolicy,
        n_threads: int,
        cache: DiskCache | None = None,
        empty: EmptyRows = "refuse",
    ) -> None:
        """`group` is None for an array without receipts; `path` is the array's, below the root."""
        self._arguments = (root, group, layout)
        self._options: dict[str, Any] = {
            "path": path, "checksums": checksums, "n_threads": n_threads, "cache": cache, "empty": empty
        }  # fmt: skip
        self._root, self._group, self._layout = root, group, layout
        self._path, self._checksums, self._n_threads, self._empty = path, checksums, n_threads, empty
        self._cache = cache
        self.shape = layout.shape
        self.row_shape = layout.row_shape
        self.dtype = np.dtype(layout.dtype)
        self._start()

    def read_into(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int, out: np.ndarray) -> None:
        """Read sample `rows[i]`, view `views[i]` into `out[i]`.

        `rows` int64 (B,), any order, repeats allowed; `views` int64 (B,) or one int; `out` C-contiguous
        (B, *row_shape) of this array's dtype. Raises IndexError for a row or view that does not exist and StoreError,
        naming shard and row, for an empty row, a damaged shard or a wrong checksum; `out` is then undefined.
        """
        gather_into([(self, out)], rows, views)

    def _pieces(self, places: Places, out: np.ndarray, cuts: Sequence[float]) -> list[Piece]:
        """The work of a read, cut for threads to share at fractions of it. What takes Python's lock is done here."""
        units, slots, order, merge = places
        if out.shape != (len(order), *self.row_shape) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {self.dtype} {(len(order), *self.row_shape)}, got {out.dtype} {out.shape}"
            )
        targets = out.reshape(-1).view(np.uint8).data
        offsets = self._locate(units, slots)
        if not self._all_regular and (offsets < 0).any():
            empty = offsets < 0
            if self._empty == "refuse":
                where = self._where(int(units[empty][0]), int(slots[empty][0]))
                raise StoreError(f"{where} is empty: {self._why_empty()}")
            out[order[empty]] = 0
            units, slots, order, offsets = (array[~empty] for array in (units, slots, order, offsets))
        check = self._checks.needed(units, slots)
        bounds = [round(len(order) * cut) for cut in cuts]
        return [
            partial(self._read_piece, merge, check, targets, (units[i:j], slots[i:j], order[i:j], offsets[i:j]))
            for i, j in pairwise(bounds)
        ]

    def will_read(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int) -> None:
        """Say that these rows are read soon, so that the disk starts now. Costs system calls, returns nothing.

        A hint: the rows must exist, and nothing else is checked. Does nothing for a remote root, whose requests are
        already many at once.
        """
        self._start_if_forked()
        places = Places.of(rows, views, self._layout)
        if len(places.units) == 0 or not self._files.by_bytes:
            return
        offsets = self._locate(places.units, places.slots)
        there = offsets >= 0
        self._files.will_read(places.units[there], offsets[there], self._layout.stored_bytes)

    def close(self) -> None:
        """Close every file and stop the threads; the reader opens them again if it is used again."""
        if os.getpid() != self._pid:  # locks of the parent may be held for ever
            self._start()
            return
        self._pool.shutdown(wait=True)
        self._files.close()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix=f"gather-{self._layout.name}")
        self._checks = ChunkChecks(self._checksums, self._root, self._group, self._layout, self._path)
        self._files: ShardFiles
        if self._root.path is not None:
            self._files = LocalFiles(self._root.path, self._path, self._layout)
        else:
            self._files = RemoteFiles(self._root, self._path, self._layout, self._cache, self._checks.crcs)
        self._state = np.zeros(self._layout.store.n_units, dtype=np.uint8)
        self._all_regular = False
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()  # int64 (S·V,) offsets, −1 where empty
        self._lock = threading.Lock()  # of the indexes

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ArrayReader.__init__(self, *state["arguments"], **state["options"])

    def _start_if_forked(self) -> None:
        if os.getpid() != self._pid:  # locks, threads and files of the parent are not ours
            self._start()

    def _locate(self, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Byte offsets in their shards, −1 where a chunk is empty."""
        if self._all_regular:
            return slots * self._layout.stored_bytes
        states = self._state[units]
        if (states == UNKNOWN).any():
            self._together(self._look_up, np.unique(units[states == UNKNOWN]).tolist(), self._n_threads)
            states = self._state[units]
            if (self._state == REGULAR).all():
                self._all_regular = True
        offsets = slots * self._layout.stored_bytes
        if (states == IRREGULAR).any():
            for unit in np.unique(units[states == IRREGULAR]).tolist():
                of_unit = units == unit
                offsets[of_unit] = self._index(unit)[slots[of_unit]]
        return offsets

    def _read_piece(self, merge: bool, check: Check | None, targets: memoryview, piece: tuple[np.ndarray, ...]) -> None:
        units, _, order, offsets = piece
        try:
            if not merge and check is None and isinstance(self._files, LocalFiles):
                with contextlib.suppress(EOFError, OSError):  # read again below, to know which row it was
                    self._files.read_rows(units, offsets, order, targets, self._layout.chunk_bytes)
                    return
            self._files.read(self._plan(targets, *piece), check)
        except FileNotFoundError as error:
            raise StoreError(f"shard {error.filename or error} is missing; {HEAL}") from None
        except ReadError as error:
            read, why = error.args
            raise StoreError(f"{self._where(read.unit, read.slots[0])}: {why}") from error

    def _plan(
        self, targets: memoryview, units: np.ndarray, slots: np.ndarray, order: np.ndarray, offsets: np.ndarray
    ) -> Iterator[Read]:
        """Runs of chunks that touch in a file, each one read, in the order of units."""
        n_bytes, stored = self._layout.chunk_bytes, self._layout.stored_bytes
        most = min(MAX_MERGED_CHUNKS, max(1, MAX_MERGED_BYTES // stored))
        touching = (np.diff(offsets) == stored) & (np.diff(units) == 0)
        places, positions, unit_list, slot_list = offsets.tolist(), order.tolist(), units.tolist(), slots.tolist()
        beside = self._checks.beside
        scratch = bytearray(CRC_BYTES)
        start = 0
        for stop in [*(np.flatnonzero(~touching) + 1).tolist(), len(places)]:
            while start < stop:
                end = min(stop, start + most)
                first = positions[start] * n_bytes
                buffers: list[Any] = [targets[first : first + n_bytes]]
                for position in positions[start + 1 : end]:
                    buffers.append(bytearray(CRC_BYTES) if beside else scratch)
                    buffers.append(targets[position * n_bytes : (position + 1) * n_bytes])
                if beside:
                    buffers.append(bytearray(CRC_BYTES))
                length = (end - start) * stored - (0 if beside else CRC_BYTES)
                yield Read(unit_list[start], places[start], length, slot_list[start:end], buffers)
                start = end

    def _look_up(self, unit: int) -> None:
        """Find out whether a shard's chunks lie one after the other, as our writer leaves them."""
        if self._state[unit] != UNKNOWN:
            return
        index = self._read_index(unit)
        n_chunks = len(self._layout.store.unit_rows(unit)) * self.shape[1]
        regular = np.arange(n_chunks, dtype=np.int64) * self._layout.stored_bytes
        if np.array_equal(index[:n_chunks], regular):
            self._state[unit] = REGULAR
            return
        self._keep(unit, index)
        if not self._files.by_bytes:  # an object may be replaced between two reads, when what failed in it is mended
            self._checks.each_time.add(unit)
        self._state[unit] = IRREGULAR

    def _index(self, unit: int) -> np.ndarray:
        """The offsets of an irregular shard. What is known of it stays known: other threads may have looked already."""
        index = self._indexes.get(unit)
        if index is None:
            index = self._read_index(unit)
            self._keep(unit, index)
        return index

    def _read_index(self, unit: int) -> np.ndarray:
        """Where each chunk of a shard lies, int64 (S·V,), −1 where it is empty."""
        try:
            size, tail = self._files.tail(unit, self._layout.index_bytes)
        except FileNotFoundError:
            if self._empty == "refuse":
                fix = HEAL if self._group is not None else self._why_empty()
                raise StoreError(f"shard {self._files.where(unit)} is missing; {fix}") from None
            return np.full(self._layout.n_shard_chunks, -1, dtype=np.int64)
        table = parse_shard_index(tail, size, self._layout, self._files.where(unit))
        return np.where(table[:, 0] == EMPTY, -1, table[:, 0].astype(np.int64))

    def _keep(self, unit: int, index: np.ndarray) -> None:
        with self._lock:
            self._indexes[unit] = index
            while len(self._indexes) > max(1, INDEX_BYTES_KEPT // index.nbytes):  # those of an array are of one size
                self._indexes.popitem(last=False)

    def _together(self, work: Callable[[Any], None], pieces: Sequence[Any], n_threads: int) -> None:
        """Do the pieces, here and on the pool, each thread taking the next one that is left.

        Returns when nobody works on any, and raises the first error. The caller does not wait for a thread to wake up.
        """
        left = iter(pieces)  # taking the next item of a list's iterator is atomic

        def take() -> None:
            for piece in left:
                work(piece)

        futures = [self._pool.submit(take) for _ in range(min(n_threads, len(pieces)) - 1)]
        try:
            take()
        finally:
            for future in futures:  # nobody may write into the caller's memory once we return
                if not future.cancel():
                    future.exception()
        for future in futures:
            if not future.cancelled():
                future.result()

    def _why_empty(self) -> str:
        if self._group is not None:
            return "its sample failed"
        return 'its writer left it out; open the array with empty="fill" if that means zeros'

    def _where(self, unit: int, slot: int) -> str:
        return sample_at(self._root, self._path, self._layout, unit, slot)
