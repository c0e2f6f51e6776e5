"""The geometry of a store: arrays, shards, units and where each lies. Pure arithmetic; nothing here touches a disk.

Shape legend: N rows (samples), V views, S rows a shard. An array has shape (N, V, *row_shape). An inner chunk is one
sample of one view, (1, 1, *row_shape); a shard holds S consecutive rows, so shard u holds rows [u·S, (u+1)·S) and lies
at `c/u/0/0…` as the Zarr v3 specification's default chunk key encoding puts it. A *unit* is the work on one shard's
rows, for every array of a group at once.

A shard file, written in this order (Zarr v3 `sharding_indexed`, index at the end):

    chunk 0 | crc32c | chunk 1 | crc32c | …        the chunks of present rows, row-major, views innermost
    (offset, nbytes) uint64 little-endian × S·V     2⁶⁴−1, 2⁶⁴−1 where the row is empty
    crc32c of that index
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from storage.base.errors import UserError
from storage.base.shown import counted

FORMAT_VERSION = 1
ANOTHER_VERSION = "update this project, or use the one that wrote it"
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and length, uint64 each
EMPTY = np.uint64(2**64 - 1)  # what the specification writes for a chunk that is not there

METADATA = "zarr.json"
INDEX_FILE = "index.parquet"
RECEIPTS_DIR = "receipts"
STORE_RECEIPT = f"{RECEIPTS_DIR}/store.json"
GROUP_KINDS = ("latents", "features")


def is_group_path(path: str) -> bool:
    """Whether a group may lie there: latents/<name> or features/<name>, with no slash more."""
    kind, _, name = path.partition("/")
    return kind in GROUP_KINDS and name != "" and "/" not in name and not name.startswith(".")


def sample_in_words(row_shape: Sequence[int], dtype: DTypeLike) -> str:
    """What one sample of one view is, for people: `64×128 float16`."""
    return f"{'×'.join(map(str, row_shape)) or 'a number'} {np.dtype(dtype).name}"


def checked_rows(rows: Any, views: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`rows` as int64 (B,) and `views` as int64 (B,) or (), of an array of `shape` (N, V, …).

    Raises ValueError where numpy would silently convert or broadcast, IndexError for a row or view that is not there.
    """
    rows, views = np.asarray(rows), np.asarray(views)
    for what, values in (("rows", rows), ("views", views)):
        if values.dtype.kind not in "iu" and values.size:  # 1.7 is no row, and a mask is not a list of rows
            raise ValueError(f"{what} must be whole numbers, got {values.dtype}")
    if rows.ndim != 1 or views.shape not in ((), rows.shape):
        raise ValueError(f"rows must be (B,) and views one number or (B,), got {rows.shape} and {views.shape}")
    for what, values, n in (("rows", rows, shape[0]), ("views", views, shape[1])):
        if values.size and (values.min() < 0 or values.max() >= n):
            raise IndexError(f"{what} must lie in [0, {n}), got {values.min()} to {values.max()}")
    return rows.astype(np.int64, copy=False), views.astype(np.int64, copy=False)


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """What every array of a store shares: rows, views, resolution and shard size."""

    n_rows: int
    views: tuple[str, ...]
    resolution: int
    shard_rows: int

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise UserError(f"a store needs at least one row, got {self.n_rows}; check that the source finds images")
        if self.views not in (("original",), ("original", "hflip")):
            raise UserError(f"views must be (original) or (original, hflip), got {self.views}")
        if self.shard_rows < 1:
            raise UserError(f"rows a shard must be at least 1, got {self.shard_rows}")
        if self.resolution < 8:
            raise UserError(f"resolution is in pixels and at least 8, got {self.resolution}")

    @property
    def n_views(self) -> int:
        """V: how many views of each sample are stored."""
        return len(self.views)

    def __str__(self) -> str:
        return f"{counted(self.n_rows, 'row')}, {counted(self.n_views, 'view')}"

    @property
    def n_units(self) -> int:
        """How many units (shards of each array) the rows fall into; the last may be short."""
        return math.ceil(self.n_rows / self.shard_rows)

    def unit_rows(self, unit: int) -> range:
        """The rows of `unit`; raises IndexError outside [0, n_units)."""
        if not 0 <= unit < self.n_units:
            raise IndexError(f"unit {unit} of {self.n_units}")
        return range(unit * self.shard_rows, min((unit + 1) * self.shard_rows, self.n_rows))


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array: its name, the dtype of an element and the shape of one sample of one view."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    store: StoreLayout

    def __post_init__(self) -> None:
        if not self.row_shape or any(n < 1 for n in self.row_shape):
            raise UserError(f"array {self.name}: every axis of a row must be at least 1, got {self.row_shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V, *row_shape)."""
        return (self.store.n_rows, self.store.n_views, *self.row_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """(1, 1, *row_shape): the inner chunk."""
        return (1, 1, *self.row_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """(S, V, *row_shape)."""
        return (self.store.shard_rows, self.store.n_views, *self.row_shape)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk without its checksum."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of one inner chunk with its checksum, as it lies in a shard."""
        return self.chunk_bytes + CRC_BYTES

    @property
    def n_shard_chunks(self) -> int:
        """S·V: chunk slots of a shard, also of a short last one."""
        return self.store.shard_rows * self.store.n_views

    @property
    def index_bytes(self) -> int:
        """Bytes of the shard index with its checksum, at the end of the file."""
        return self.n_shard_chunks * INDEX_ENTRY_BYTES + CRC_BYTES

    def shard_key(self, unit: int) -> str:
        """Path of shard `unit` below the array: `c/<unit>/0/0…`."""
        return "/".join(["c", str(unit), *["0"] * (len(self.row_shape) + 1)])


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """The arrays one encoder writes, below `path` ("latents/<name>" or "features/<name>")."""

    path: str
    arrays: tuple[ArrayLayout, ...]

    def __post_init__(self) -> None:
        if not is_group_path(self.path):
            raise UserError(
                f"a group lies at latents/<name> or features/<name>, no name begins with a dot, got {self.path!r}"
            )

    @property
    def store(self) -> StoreLayout:
        """The layout shared by the arrays."""
        return self.arrays[0].store

    @property
    def sample_bytes(self) -> int:
        """Bytes one sample takes in all arrays and views, with chunk checksums and its share of the shard index."""
        per_view = sum(a.chunk_bytes + CRC_BYTES + INDEX_ENTRY_BYTES for a in self.arrays)
        return per_view * self.store.n_views

    def receipt_key(self, unit: int) -> str:
        """Path of the unit's receipt below the store root."""
        return f"{RECEIPTS_DIR}/{self.path}/{unit:08d}.json"

    @staticmethod
    def metadata_receipt_key(path: str) -> str:
        """Path of the receipt of a group's own metadata."""
        return f"{RECEIPTS_DIR}/{path}/metadata.json"
