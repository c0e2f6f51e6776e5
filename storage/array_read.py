"""Reading a batch of rows from one array: from rows to ranges of its shards, and from there into the caller's memory.

A row is one range of one `preadv`; rows that touch in the file are read by one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from storage.base.errors import StoreError
from storage.layout import CRC_BYTES, ArrayLayout, checked_rows
from storage.opened_array import OpenArray
from storage.read import Read, ReadError
from storage.shard import HEAL
from storage.shard_files import LocalFiles

MAX_MERGED_BYTES = 16 << 20  # a longer run is cut, so that threads share it
MAX_MERGED_CHUNKS = 512  # half of what one preadv takes, as each chunk is followed by its checksum

Piece = Callable[[], None]


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


class ArrayRead:
    """One batch of one array. What takes Python's lock is done when it is made; `pieces` are for threads."""

    def __init__(self, array: OpenArray, places: Places, out: np.ndarray) -> None:
        """Raises ValueError for an `out` of another shape, dtype or order, StoreError for a row that is empty."""
        shape, dtype = (len(places.order), *array.layout.row_shape), np.dtype(array.layout.dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous {dtype} {shape}, got {out.dtype} {out.shape}")
        units, slots, order, self._merge = places
        offsets = array.offsets.find(units, slots)
        empty = offsets < 0
        if empty.any():
            if array.empty == "refuse":
                where = array.sample_at(int(units[empty][0]), int(slots[empty][0]))
                raise StoreError(f"{where} is empty: {array.why_empty}")
            out[order[empty]] = 0
            units, slots, order, offsets = (values[~empty] for values in (units, slots, order, offsets))
        self._array, self._chunks = array, (units, slots, order, offsets)
        self._check = array.checks.needed(units, slots)
        self._memory = out.reshape(-1).view(np.uint8).data
        self.n_rows, self.n_bytes, self.row_bytes = len(places.order), out.nbytes, array.layout.chunk_bytes

    def pieces(self, cuts: Sequence[float]) -> list[Piece]:
        """The work, cut at fractions of it."""
        bounds = [round(len(self._chunks[0]) * cut) for cut in cuts]
        return [partial(self._read, *(values[i:j] for values in self._chunks)) for i, j in pairwise(bounds)]

    def _read(self, units: np.ndarray, slots: np.ndarray, order: np.ndarray, offsets: np.ndarray) -> None:
        files = self._array.files
        try:
            if not self._merge and self._check is None and isinstance(files, LocalFiles):
                with contextlib.suppress(EOFError, OSError):  # read again below, to know which row it was
                    files.read_rows(units, offsets, order, self._memory, self.row_bytes)
                    return
            files.read(self._runs(units, slots, order, offsets), self._check)
        except FileNotFoundError as error:
            raise StoreError(f"shard {error.filename or error} is missing; {HEAL}") from None
        except ReadError as error:
            read, why = error.args
            raise StoreError(f"{self._array.sample_at(read.unit, read.slots[0])}: {why}") from error

    def _runs(self, units: np.ndarray, slots: np.ndarray, order: np.ndarray, offsets: np.ndarray) -> Iterator[Read]:
        """Runs of chunks that touch in a file, each one read, in the order of units."""
        memory, n_bytes, stored = self._memory, self.row_bytes, self._array.layout.stored_bytes
        most = min(MAX_MERGED_CHUNKS, max(1, MAX_MERGED_BYTES // stored))
        touching = (np.diff(offsets) == stored) & (np.diff(units) == 0)
        places, positions, unit_list, slot_list = offsets.tolist(), order.tolist(), units.tolist(), slots.tolist()
        beside = self._array.checks.beside
        scratch = bytearray(CRC_BYTES)
        start = 0
        for stop in [*(np.flatnonzero(~touching) + 1).tolist(), len(places)]:
            while start < stop:
                end = min(stop, start + most)
                first = positions[start] * n_bytes
                buffers: list[Any] = [memory[first : first + n_bytes]]
                for position in positions[start + 1 : end]:
                    buffers.append(bytearray(CRC_BYTES) if beside else scratch)
                    buffers.append(memory[position * n_bytes : (position + 1) * n_bytes])
                if beside:
                    buffers.append(bytearray(CRC_BYTES))
                length = (end - start) * stored - (0 if beside else CRC_BYTES)
                yield Read(unit_list[start], places[start], length, slot_list[start:end], buffers)
                start = end
