"""Gathering: any rows, in any order, from a Zarr array's shards into a caller's buffer.

Guarantees: `out[i]` is the stored sample of (rows[i], views[i]) bit for bit, or an error that names the shard and the
row; a row that was left empty is an error, never zeros. Open files are bounded, so a store of any number of shards is
read under the usual limit of 1,024. The reader may be used from several threads, survives a fork and pickles (a worker
process opens its own files).

Costs: a row is one range of one `preadv` straight into the caller's memory, which releases the GIL; ranges that touch
in the file are read by one call. The first read of a shard opens it and reads its index (16 bytes a chunk). Checking a
chunk costs one CRC-32C pass over it.

Checksums: `never` trusts the disk, `always` checks every read, `first` (default) checks each chunk once a process. The
CRC is compared with the unit's receipt, not with the copy beside the chunk, so a whole and valid shard in the wrong
place is found too.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np

from storage.errors import StoreError
from storage.layout import CRC_BYTES, EMPTY, ArrayLayout, GroupLayout
from storage.receipts import read_receipt
from storage.shard import HEAL, IOV_MAX, read_shard_index

ChecksumPolicy = Literal["never", "first", "always"]
MAX_MERGED_BYTES = 16 << 20  # a longer run is cut, so that threads share it


@dataclass
class _OpenShard:
    fd: int
    path: Path
    index: np.ndarray  # uint64 (S·V, 2)
    pins: int = 0
    crcs: np.ndarray | None = None  # uint32 (S·V,), from the receipt, when the first check needs it
    checked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


class ArrayReader:
    """One array of a group, read by rows. Made by `GroupReader`; `shape`, `dtype` and `row_shape` describe it."""

    def __init__(
        self, root: Path, group: GroupLayout, layout: ArrayLayout, checksums: ChecksumPolicy, n_threads: int
    ) -> None:
        assert checksums in ("never", "first", "always"), checksums
        self._root, self._group, self._layout = root, group, layout
        self._checksums, self._n_threads = checksums, n_threads
        self.shape = layout.shape
        self.row_shape = layout.row_shape
        self.dtype = np.dtype(layout.dtype)
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = max(8, min(512, soft_limit // 8))  # several arrays, and the rest of the process, share it
        self._start()

    def read_into(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int, out: np.ndarray) -> None:
        """Read sample `rows[i]`, view `views[i]` into `out[i]`.

        `rows` int64 (B,), any order, repeats allowed; `views` int64 (B,) or one int; `out` C-contiguous
        (B, *row_shape) of this array's dtype. Raises IndexError for a row or view that does not exist and StoreError,
        naming shard and row, for an empty row, a damaged shard or a wrong checksum; `out` is then undefined.
        """
        rows = np.asarray(rows, dtype=np.int64)
        views = np.broadcast_to(np.asarray(views, dtype=np.int64), rows.shape)
        n_rows, n_views = self.shape[:2]
        if out.shape != (len(rows), *self.row_shape) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {self.dtype} {(len(rows), *self.row_shape)}, got {out.dtype} {out.shape}"
            )
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= n_rows:
            raise IndexError(f"rows must lie in [0, {n_rows}), got {rows.min()} to {rows.max()}")
        if views.min() < 0 or views.max() >= n_views:
            raise IndexError(f"views must lie in [0, {n_views}), got {views.min()} to {views.max()}")
        if os.getpid() != self._pid:  # forked: locks and threads of the parent are not ours
            self._start()
        units, slots = np.divmod(rows, self._layout.store.shard_rows)
        slots = slots * n_views + views
        order = np.lexsort((slots, units))
        units, slots = units[order], slots[order]
        targets = out.reshape(len(rows), -1).view(np.uint8)
        pieces = np.array_split(np.arange(len(order)), min(self._n_threads, len(order)))
        jobs = [(units[piece], slots[piece], order[piece], targets) for piece in pieces]
        if len(jobs) == 1:
            self._read_piece(*jobs[0])
            return
        futures = [self._pool.submit(self._read_piece, *job) for job in jobs[1:]]
        try:
            self._read_piece(*jobs[0])
        finally:
            for future in futures:  # nobody may write into `out` once we return
                future.exception()
        for future in futures:
            future.result()

    def close(self) -> None:
        """Close every file and stop the threads; the reader opens them again if it is used again."""
        self._pool.shutdown(wait=True)
        for shard in self._open.values():
            os.close(shard.fd)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix=f"gather-{self._layout.name}")

    def __getstate__(self) -> dict[str, Any]:
        return {
            "root": self._root,
            "group": self._group,
            "layout": self._layout,
            "checksums": self._checksums,
            "n_threads": self._n_threads,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        ArrayReader.__init__(self, **state)

    def _read_piece(self, units: np.ndarray, slots: np.ndarray, order: np.ndarray, targets: np.ndarray) -> None:
        """Read sorted (unit, slot) pairs; `order` says which row of `targets` each fills."""
        starts = np.flatnonzero(np.diff(units, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(units)], strict=True):
            shard = self._acquire(int(units[start]))
            try:
                self._read_from(shard, int(units[start]), slots[start:stop], order[start:stop], targets)
            finally:
                with self._lock:
                    shard.pins -= 1

    def _read_from(
        self, shard: _OpenShard, unit: int, slots: np.ndarray, order: np.ndarray, targets: np.ndarray
    ) -> None:
        offsets = shard.index[slots, 0]
        if (offsets == EMPTY).any():
            raise StoreError(f"{self._where(shard, unit, slots[offsets == EMPTY][0])} is empty: its sample failed")
        stored_bytes = self._layout.chunk_bytes + CRC_BYTES
        most = min(IOV_MAX // 2, max(1, MAX_MERGED_BYTES // stored_bytes))
        touching = np.diff(offsets.astype(np.int64), prepend=-1) == stored_bytes
        start = 0
        while start < len(slots):
            stop = start + 1
            while stop < len(slots) and touching[stop] and stop - start < most:
                stop += 1
            self._read_run(shard, unit, int(offsets[start]), slots[start:stop], [targets[i] for i in order[start:stop]])
            start = stop

    def _read_run(
        self, shard: _OpenShard, unit: int, offset: int, slots: np.ndarray, targets: list[np.ndarray]
    ) -> None:
        """One `preadv` of neighbouring chunks; the stored checksums between them go to a scratch buffer."""
        scratch = bytearray(CRC_BYTES)
        buffers: list[Any] = [buffer for target in targets for buffer in (target, scratch)]
        expected = len(targets) * (self._layout.chunk_bytes + CRC_BYTES)
        got = os.preadv(shard.fd, buffers, offset)
        if got != expected:
            got = self._read_slowly(shard.fd, buffers, offset)
        if got != expected:
            raise StoreError(f"{self._where(shard, unit, slots[0])}: {got} of {expected} bytes at {offset}; {HEAL}")
        if self._checksums == "never":
            return
        crcs = self._receipt_crcs(shard, unit)
        for slot, target in zip(slots.tolist(), targets, strict=True):
            if self._checksums == "first" and shard.checked[slot]:
                continue
            if google_crc32c.value(target) != crcs[slot]:
                raise StoreError(f"{self._where(shard, unit, slot)}: wrong checksum, the bytes are damaged; {HEAL}")
            shard.checked[slot] = True

    @staticmethod
    def _read_slowly(fd: int, buffers: list[Any], offset: int) -> int:
        """After a short read (a signal, a file system's limit): buffer by buffer to the end of the file."""
        total = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while len(view):
                got = os.preadv(fd, [view], offset + total)
                if got == 0:
                    return total
                total += got
                view = view[got:]
        return total

    def _acquire(self, unit: int) -> _OpenShard:
        """The open shard, pinned; the least recently used ones beyond the bound are closed."""
        with self._lock:
            shard = self._open.get(unit)
            if shard is None:
                shard = self._open[unit] = self._open_shard(unit)
                self._evict()
            self._open.move_to_end(unit)
            shard.pins += 1
            return shard

    def _open_shard(self, unit: int) -> _OpenShard:
        path = self._root / self._group.path / self._layout.name / self._layout.shard_key(unit)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"shard {path} is missing; {HEAL}") from None
        try:
            shard = _OpenShard(fd=fd, path=path, index=read_shard_index(fd, self._layout, path))
        except BaseException:
            os.close(fd)
            raise
        # Kept beside the bounded files, since "once a process" must outlive an eviction: one bit a chunk would do,
        # one byte is simpler, and it is only ever allocated for shards that are read.
        shard.checked = self._checked.setdefault(unit, np.zeros(self._layout.n_shard_chunks, dtype=bool))
        return shard

    def _evict(self) -> None:
        for unit in [unit for unit, shard in self._open.items() if shard.pins == 0]:
            if len(self._open) <= self._max_open:
                return
            if unit != next(reversed(self._open)):
                os.close(self._open.pop(unit).fd)

    def _receipt_crcs(self, shard: _OpenShard, unit: int) -> np.ndarray:
        if shard.crcs is None:
            receipt = read_receipt(self._root, self._group, unit)
            key = f"{self._layout.name}/{self._layout.shard_key(unit)}"
            records = [record for record in receipt.shards if record.path == key] if receipt else []
            if not records:
                raise StoreError(f"shard {shard.path} has no receipt to check it against; {HEAL}")
            shard.crcs = records[0].crcs()
        return shard.crcs

    def _where(self, shard: _OpenShard, unit: int, slot: int | np.integer) -> str:
        row, view = divmod(int(slot), self._layout.store.n_views)
        return f"shard {shard.path}, row {unit * self._layout.store.shard_rows + row}, view {view}"
