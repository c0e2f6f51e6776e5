"""Checking that gathered chunks are what was written: against the CRC-32C of their unit's receipt.

The CRC beside a chunk in its shard is not asked, so a whole and valid shard in the wrong place is found too; but for an
array without receipts (another program's) it is all there is. Policies: `never` trusts the disk, `always` checks every
read, `first` (default) checks each chunk once a process, for which a bit a chunk is kept.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from crc32c import crc32c

from storage.base.errors import StoreError
from storage.layout import ArrayLayout, GroupLayout
from storage.read import Check, Read
from storage.receipts import HEAL_RECEIPT, read_receipt
from storage.roots import Root
from storage.shard import HEAL
from storage.shard_files import cannot_open

ChecksumPolicy = Literal["never", "first", "always"]
CHECKSUM_BYTES_KEPT = 32 << 20  # of receipts, 4 bytes a chunk


class ChunkChecks:
    """What an array's chunks are checked against, and which have been."""

    def __init__(
        self,
        policy: ChecksumPolicy,
        root: Root,
        group: GroupLayout | None,
        layout: ArrayLayout,
        path: str,
    ) -> None:
        """`group` is None for an array without receipts; `path` is the array's, below the root."""
        assert policy in ("never", "first", "always"), policy
        self._policy = policy
        self._where = partial(sample_at, root, path, layout)
        self.beside = policy != "never" and group is None  # reads must bring what is stored beside each chunk
        n_kept = max(1, CHECKSUM_BYTES_KEPT // (4 * layout.n_shard_chunks))
        self.crcs = None if group is None else lru_cache(n_kept)(partial(receipt_crcs, root, group, layout))
        # One bit a chunk, all shards; the kernel gives memory to the pages that are touched.
        self._seen = np.zeros((layout.store.n_units, (layout.n_shard_chunks + 7) // 8), dtype=np.uint8)
        self.n_unseen = layout.shape[0] * layout.shape[1]
        self.each_time: set[int] = set()  # units that are checked at every read, unless never
        self._lock = threading.Lock()

    def needed(self, units: np.ndarray, slots: np.ndarray) -> Check | None:
        """What checks a read of these chunks; None when nothing is left to check."""
        if self._policy == "never":
            return None
        again = self.each_time and not self.each_time.isdisjoint(units.tolist())
        if self._policy == "first" and not again and self._all_seen(units, slots):
            return None
        return self._check

    def _all_seen(self, units: np.ndarray, slots: np.ndarray) -> bool:
        if self.n_unseen == 0:
            return True
        seen = self._seen[units, slots >> 3] >> (slots & 7).astype(np.uint8)
        return bool((seen & 1).all())

    def _check(self, read: Read) -> None:
        seen = self._seen[read.unit]
        once = self._policy == "first" and read.unit not in self.each_time
        crcs = None if self.crcs is None else self.crcs(read.unit)
        for i, slot in enumerate(read.slots):
            if once and seen[slot >> 3] >> (slot & 7) & 1:
                continue
            wanted = int.from_bytes(read.buffers[2 * i + 1], "little") if crcs is None else int(crcs[slot])
            if crc32c(read.buffers[2 * i]) != wanted:
                raise StoreError(f"{self._where(read.unit, slot)}: wrong checksum, the bytes are damaged; {HEAL}")
            if once:
                with self._lock:
                    self.n_unseen -= not seen[slot >> 3] >> (slot & 7) & 1
                    seen[slot >> 3] |= 1 << (slot & 7)


def sample_at(root: Root, path: str, layout: ArrayLayout, unit: int, slot: int) -> str:
    """The name of a sample in messages: its shard, row and view."""
    row, view = divmod(slot, layout.store.n_views)
    row += unit * layout.store.shard_rows
    return f"shard {root.at(f'{path}/{layout.shard_key(unit)}')}, row {row}, view {view}"


def receipt_crcs(root: Root, group: GroupLayout, layout: ArrayLayout, unit: int) -> np.ndarray:
    """Checksums of a shard's chunks, uint32 (S·V,). Raises StoreError when no receipt can be read that has them."""
    shard = root.at(f"{group.path}/{layout.name}/{layout.shard_key(unit)}")
    try:
        receipt = read_receipt(root, group, unit)
    except OSError as error:
        raise cannot_open(f"the receipt of shard {shard}", error) from error
    record = receipt.shard(layout.name) if receipt else None
    if record is None:
        raise StoreError(f"shard {shard} has no receipt to check it against; {HEAL}")
    if not record.has_crcs(layout.n_shard_chunks):
        raise StoreError(f"the receipt of shard {shard} is damaged (not one checksum a chunk); {HEAL_RECEIPT}")
    return record.crcs()
