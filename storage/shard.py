"""One Zarr v3 shard file: written whole and atomically, its index read, its chunks read by range.

The format is in `layout.py`. A shard is written straight from the caller's array (`writev`, no copy), synced, and
renamed to its final name, so a shard under its final name is whole whatever was killed. Cost of a write, beside the
bytes: one CRC-32C pass over memory (tens of GB/s) and, unless the caller waives them, two fsyncs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from crc32c import crc32c

from storage.base.errors import StoreError
from storage.layout import CRC_BYTES, EMPTY, INDEX_ENTRY_BYTES, ArrayLayout
from storage.receipts import ShardRecord
from storage.roots import Root
from storage.staging import staging_key

CHECKSUM_AHEAD_BYTES = 8 << 20


def write_shard(
    root: Root,
    group_path: str,
    layout: ArrayLayout,
    unit: int,
    rows: np.ndarray,
    present: np.ndarray,
    run_id: str,
    *,
    fsync: bool = True,
) -> ShardRecord:
    """Publish one shard and return its record.

    `rows` (n, V, *row_shape) of the array's dtype, C-contiguous, n = rows of the unit; `present` bool (n,). The chunks
    of a row that is not present are left empty, whatever `rows` holds there. The run's staging must be prepared. Raises
    StoreError as `Root.write` does; no part of a shard is ever seen under its final name.
    """
    expected = (len(layout.store.unit_rows(unit)), layout.store.n_views, *layout.row_shape)
    assert (rows.shape, rows.dtype) == (expected, np.dtype(layout.dtype)), (rows.shape, expected, rows.dtype)
    assert rows.flags.c_contiguous
    assert present.shape == expected[:1]
    key = f"{layout.name}/{layout.shard_key(unit)}"
    if np.dtype(layout.dtype).byteorder == ">" or not np.little_endian:
        raise StoreError("shards are little-endian; this machine or dtype is not")
    crcs = np.zeros(layout.n_shard_chunks, dtype="<u4")
    buffers = _shard_buffers(layout, rows, present, crcs)
    staging = staging_key(group_path, run_id)
    nbytes = root.write(f"{group_path}/{key}", buffers, run_id, staging=staging, fsync=fsync)
    return ShardRecord(path=key, nbytes=nbytes, chunk_crc32c=ShardRecord.pack(crcs))


def parse_shard_index(tail: bytes, file_bytes: int, layout: ArrayLayout, where: str) -> np.ndarray:
    """The index uint64 (S·V, 2) of (offset, nbytes) from the file's last `layout.index_bytes` bytes.

    Raises StoreError when it is short, damaged, or speaks of bytes that are not there.
    """
    if len(tail) != layout.index_bytes:
        raise StoreError(
            f"shard {where} has {file_bytes} bytes, too short for its index of {layout.index_bytes}; {HEAL}"
        )
    body, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if crc32c(body) != int.from_bytes(crc, "little"):
        raise StoreError(f"shard {where}: the checksum of its index is wrong; {HEAL}")
    index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    present = index[:, 0] != EMPTY
    last = file_bytes - layout.index_bytes - layout.stored_bytes
    lengths_hold = index[present, 1] == layout.stored_bytes
    inside = index[present, 0] <= np.uint64(max(0, last))
    if not (lengths_hold.all() and inside.all()) or (present.any() and last < 0):
        raise StoreError(f"shard {where}: its index points outside the file or at chunks of another size; {HEAL}")
    return index


HEAL = "run precompute again with this unit's receipt deleted to write the shard anew"


def _shard_buffers(
    layout: ArrayLayout, rows: np.ndarray, present: np.ndarray, crcs: np.ndarray
) -> Iterator[np.ndarray]:
    """The file as uint8 buffers that share memory with `rows`; fills the chunk checksums `crcs` uint32 (S·V,).

    A thread computes the checksums of the next block while one is written; both let go of the GIL.
    """
    chunks = rows.reshape(len(present) * layout.store.n_views, -1).view(np.uint8)
    index = np.full((layout.n_shard_chunks, 2), EMPTY, dtype="<u8")
    slots = np.flatnonzero(np.repeat(present, layout.store.n_views))
    index[slots, 0] = np.arange(len(slots), dtype=np.uint64) * np.uint64(layout.stored_bytes)
    index[slots, 1] = layout.stored_bytes
    n_ahead = max(1, CHECKSUM_AHEAD_BYTES // layout.chunk_bytes)
    blocks = [slots[i : i + n_ahead].tolist() for i in range(0, len(slots), n_ahead)]

    def checksum(block: list[int]) -> None:
        for slot in block:
            crcs[slot] = crc32c(chunks[slot])

    with ThreadPoolExecutor(1, thread_name_prefix="checksum") as pool:
        ahead = [pool.submit(checksum, block) for block in blocks[:1]]
        for i, block in enumerate(blocks):
            ahead.pop().result()
            ahead += [pool.submit(checksum, block) for block in blocks[i + 1 : i + 2]]
            for slot in block:
                yield chunks[slot]
                yield crcs[slot : slot + 1].view(np.uint8)
    yield index.reshape(-1).view(np.uint8)
    yield np.array([crc32c(index.tobytes())], dtype="<u4").view(np.uint8)
    assert index.nbytes == layout.n_shard_chunks * INDEX_ENTRY_BYTES
