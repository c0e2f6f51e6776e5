"""A bounded cache of a remote store on a local disk.

The budget buys the first k units of a group, all its arrays, and the cache holds those rows and no others. Training
visits every row once an epoch in random order, where nothing that evicts does better; and so the bound is exact, needs
no record of use, and any number of processes share a directory without talking to each other.

A cached shard is a sparse file of the same layout as the remote one, filled row by row as rows are read. What says that
a row is there is its checksum in the unit's receipt: a half-written or foreign file can only be missed, never believed.

Cost: a hit is one `pread` and one CRC-32C pass, a miss one `pwrite` more. A full disk ends the filling, with a warning,
and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from storage.base.boundary import open_regular
from storage.base.errors import StoreError, UserError
from storage.layout import GroupLayout
from storage.read import Read


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where, and how many bytes at most for one group."""

    directory: Path
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise UserError(f"a cache needs at least one byte, got {self.max_bytes}")


@dataclass(frozen=True)
class DiskCache:
    """One group's cached units; pickles, and opens files for the time of a call only."""

    directory: Path
    n_units: int

    def path(self, array: str, unit: int) -> Path:
        """The cached copy of a shard."""
        return self.directory / array.rsplit("/", 1)[-1] / f"{unit}.shard"

    def fill(self, array: str, read: Read, crcs: np.ndarray) -> bool:
        """Fill the read's buffers; False when a chunk of it is not there whole. `crcs` uint32 (S·V,), the receipt's."""
        try:
            fd = open_regular(self.path(array, read.unit))
            try:
                if os.preadv(fd, read.buffers, read.offset) != read.n_bytes:
                    return False
            finally:
                os.close(fd)
        except (OSError, StoreError):  # not there yet, no file, or a disk that fails: the remote store has it
            return False
        return all(crc32c(read.buffers[2 * i]) == int(crcs[slot]) for i, slot in enumerate(read.slots))

    def keep(self, array: str, read: Read) -> bool:
        """Write what was just fetched; False, with a warning, when the disk does not take it."""
        path = self.path(array, read.unit)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # No link is followed and no pipe waited for: whoever made the folder shall not say what is written to.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file", path)
                os.pwritev(fd, read.buffers, read.offset)
            finally:
                os.close(fd)
        except OSError as error:
            warnings.warn(
                f"cache {self.directory} cannot be written ({error.strerror}); reading on without it", stacklevel=2
            )
            return False
        return True


def group_cache(config: CacheConfig, root: str, layout: GroupLayout, digest: str) -> DiskCache:
    """The cache of one group. Its directory is named after the root and the identity, so that stores do not mix."""
    unit_bytes = sum(array.n_shard_chunks * array.stored_bytes for array in layout.arrays)
    name = f"{layout.path.replace('/', '-')}-{digest[:12]}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    return DiskCache(config.directory / name, min(layout.store.n_units, config.max_bytes // unit_bytes))
