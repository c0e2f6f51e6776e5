"""Where each chunk of an array lies in its shards.

Our writer leaves the chunks of a shard one after the other. Of such a regular shard one byte is kept, that it is one.
Any other, of rows that failed or from another program, has an index that says where its chunks lie; as many of these
are kept as `INDEX_BYTES_KEPT` holds, and what fell out is read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from storage.base.errors import StoreError
from storage.layout import EMPTY, ArrayLayout
from storage.shard import parse_shard_index
from storage.shard_files import ShardFiles
from storage.threads import Threads

INDEX_BYTES_KEPT = 16 << 20  # irregular ones, 8 bytes a chunk

UNKNOWN, REGULAR, IRREGULAR = 0, 1, 2  # what is known of a shard's index


class ChunkOffsets:
    """The offsets of one array's chunks, looked up in the shards where they must be."""

    def __init__(
        self,
        layout: ArrayLayout,
        files: ShardFiles,
        threads: Threads,
        *,
        if_missing: str | None,
        on_irregular: Callable[[int], None],
    ) -> None:
        """`if_missing` is the advice in the error about a shard that is not there; None: all of its rows are empty.

        `on_irregular` is called with each unit whose chunks do not lie one after the other, before its first offset.
        """
        self._layout, self._files, self._threads = layout, files, threads
        self._if_missing, self._on_irregular = if_missing, on_irregular
        self._state = np.zeros(layout.store.n_units, dtype=np.uint8)
        self._all_regular = False
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()  # int64 (S·V,) offsets, −1 where empty
        self._lock = threading.Lock()  # of the indexes

    def find(self, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Byte offsets int64 (B,) in their shards, −1 where a chunk is empty. Raises StoreError for a damaged shard."""
        offsets = slots * self._layout.stored_bytes
        if self._all_regular:
            return offsets
        states = self._state[units]
        if (states == UNKNOWN).any():
            self._threads.share(self._look_up, np.unique(units[states == UNKNOWN]).tolist())
            states = self._state[units]
            self._all_regular = bool((self._state == REGULAR).all())
        for unit in np.unique(units[states == IRREGULAR]).tolist():
            of_unit = units == unit
            offsets[of_unit] = self._index(unit)[slots[of_unit]]
        return offsets

    def _look_up(self, unit: int) -> None:
        if self._state[unit] != UNKNOWN:
            return
        index = self._read_index(unit)
        n_chunks = len(self._layout.store.unit_rows(unit)) * self._layout.store.n_views
        regular = np.arange(n_chunks, dtype=np.int64) * self._layout.stored_bytes
        if np.array_equal(index[:n_chunks], regular):
            self._state[unit] = REGULAR
            return
        self._keep(unit, index)
        self._on_irregular(unit)
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
        where = self._files.where(unit)
        try:
            size, tail = self._files.tail(unit, self._layout.index_bytes)
        except FileNotFoundError:
            if self._if_missing is not None:
                raise StoreError(f"shard {where} is missing; {self._if_missing}") from None
            return np.full(self._layout.n_shard_chunks, -1, dtype=np.int64)
        table = parse_shard_index(tail, size, self._layout, where)
        return np.where(table[:, 0] == EMPTY, -1, table[:, 0].astype(np.int64))

    def _keep(self, unit: int, index: np.ndarray) -> None:
        with self._lock:
            self._indexes[unit] = index
            while len(self._indexes) > max(1, INDEX_BYTES_KEPT // index.nbytes):  # those of an array are of one size
                self._indexes.popitem(last=False)
