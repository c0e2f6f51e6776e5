"""One Zarr v3 shard file: written whole and atomically, its index read, its chunks read by range.

The format is in `layout.py`. A shard is written straight from the caller's array (`writev`, no copy), synced, and
renamed to its final name, so a shard under its final name is whole whatever was killed. Cost of a write, beside the
bytes: one CRC-32C pass over memory (tens of GB/s) and two fsyncs.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from storage.errors import StoreError
from storage.files import make_directories, publish
from storage.layout import CRC_BYTES, EMPTY, INDEX_ENTRY_BYTES, ArrayLayout
from storage.receipts import ShardRecord

IOV_MAX = 1024  # buffers a single writev or preadv takes on Linux
_MENDED_BY_THE_USER = {
    errno.ENOSPC: "free space or choose another root",
    errno.EDQUOT: "raise the quota or choose another root",
    errno.EACCES: "give this user write permission",
    errno.EROFS: "mount the file system writable or choose another root",
    errno.ENOENT: "a directory of the store vanished while it was written; restore the path and run again",
}


def write_shard(
    group: Path, layout: ArrayLayout, unit: int, rows: np.ndarray, present: np.ndarray, staging: Path
) -> ShardRecord:
    """Publish one shard and return its record.

    `rows` (n, V, *row_shape) of the array's dtype, C-contiguous, n = rows of the unit; `present` bool (n,). The chunks
    of a row that is not present are left empty, whatever `rows` holds there. `staging` must exist. Raises StoreError
    when the disk is full, read-only, forbidden or gone; no part of a shard is ever seen under its final name.
    """
    expected = (len(layout.store.unit_rows(unit)), layout.store.n_views, *layout.row_shape)
    assert (rows.shape, rows.dtype) == (expected, np.dtype(layout.dtype)), (rows.shape, expected, rows.dtype)
    assert rows.flags.c_contiguous
    assert present.shape == expected[:1]
    key = f"{layout.name}/{layout.shard_key(unit)}"
    temporary = staging / f"{layout.name}-{unit}-{secrets.token_hex(4)}"
    buffers, crcs = _shard_buffers(layout, rows, present)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            write_all(fd, buffers)
            os.fsync(fd)
            nbytes = os.fstat(fd).st_size
        finally:
            os.close(fd)
        make_directories((group / key).parent)
        publish(temporary, group / key)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in _MENDED_BY_THE_USER:
            raise StoreError(
                f"cannot write shard {group / key}: {error.strerror}; {_MENDED_BY_THE_USER[error.errno]}"
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ShardRecord(path=key, nbytes=nbytes, chunk_crc32c=ShardRecord.pack(crcs))


def write_all(fd: int, buffers: Sequence[np.ndarray]) -> None:
    """`writev` every buffer (uint8, 1-D) in order, going on after a short write. Raises OSError."""
    pending = list(buffers)
    first = 0
    while first < len(pending):
        written = os.writev(fd, pending[first : first + IOV_MAX])  # type: ignore[arg-type]
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]


def read_shard_index(fd: int, layout: ArrayLayout, path: Path) -> np.ndarray:
    """The shard's index, uint64 (S·V, 2) of (offset, nbytes); raises StoreError when it is short or damaged."""
    file_bytes = os.fstat(fd).st_size
    start = file_bytes - layout.index_bytes
    raw = os.pread(fd, layout.index_bytes, start) if start >= 0 else b""
    if len(raw) != layout.index_bytes:
        raise StoreError(f"shard {path} has {file_bytes} bytes, too short for its index of {layout.index_bytes}")
    body, crc = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise StoreError(f"shard {path}: the checksum of its index is wrong; {HEAL}")
    index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    present = index[:, 0] != EMPTY
    lengths_hold = index[present, 1] == layout.chunk_bytes + CRC_BYTES
    inside = index[present, 0] <= np.uint64(max(0, start - layout.chunk_bytes - CRC_BYTES))
    if not (lengths_hold.all() and inside.all()):
        raise StoreError(f"shard {path}: its index points outside the file or at chunks of another size; {HEAL}")
    return index


HEAL = "run precompute again with this unit's receipt deleted to write the shard anew"


def _shard_buffers(layout: ArrayLayout, rows: np.ndarray, present: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The file as a list of uint8 buffers that share memory with `rows`, and the chunk checksums uint32 (S·V,)."""
    n_views, chunk_bytes = layout.store.n_views, layout.chunk_bytes
    if np.dtype(layout.dtype).byteorder == ">" or not np.little_endian:
        raise StoreError("shards are little-endian; this machine or dtype is not")
    chunks = rows.reshape(len(present) * n_views, -1).view(np.uint8)
    crcs = np.zeros(layout.n_shard_chunks, dtype="<u4")
    index = np.full((layout.n_shard_chunks, 2), EMPTY, dtype="<u8")
    buffers: list[np.ndarray] = []
    slots = np.flatnonzero(np.repeat(present, n_views))
    for slot in slots.tolist():
        crcs[slot] = google_crc32c.value(chunks[slot])
        buffers.append(chunks[slot])
        buffers.append(crcs[slot : slot + 1].view(np.uint8))
    stored_bytes = chunk_bytes + CRC_BYTES
    index[slots, 0] = np.arange(len(slots), dtype=np.uint64) * np.uint64(stored_bytes)
    index[slots, 1] = stored_bytes
    buffers.append(index.reshape(-1).view(np.uint8))
    buffers.append(np.array([google_crc32c.value(index.reshape(-1).view(np.uint8))], dtype="<u4").view(np.uint8))
    assert index.nbytes == layout.n_shard_chunks * INDEX_ENTRY_BYTES
    return buffers, crcs
