"""What an export writes: rows of some groups in order, with their samples, in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.base.errors import UserError
from storage.codecs import decoded
from storage.index import Index
from storage.reader import GroupReader, Store

BATCH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Column:
    """One exported array: "<group>/<array>", dtype and the shape (V, *row_shape) of a row."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def short(self) -> str:
        """The name without slashes, for formats that use them otherwise."""
        return self.name.replace("/", ".")


@dataclass(kw_only=True)
class Content:
    """`rows` int64, sorted, none of which failed in any of the groups; `index` holds their samples in that order."""

    store: Store
    groups: list[GroupReader]
    rows: np.ndarray
    left_out: list[int]
    index: Index
    decode: bool
    progress: Callable[[int], object] = field(default=lambda n: None)

    @property
    def columns(self) -> list[Column]:
        """The arrays, in the order in which `batches` gives them."""
        columns = []
        for group in self.groups:
            for name, (dtype, row_shape) in group.shapes(decoded=self.decode).items():
                shape = (self.store.n_views, *row_shape)
                columns.append(Column(name=f"{group.path}/{name}", dtype=np.dtype(dtype), shape=shape))
        return columns

    @property
    def attributes(self) -> dict[str, Any]:
        """What goes along: views, resolution, each group's identity, rows that were left out."""
        return {
            "views": list(self.store.layout.views),
            "resolution": self.store.resolution,
            "identities": {group.path: group.identity.plain() for group in self.groups},
            "decoded": self.decode,
            "left_out_rows": self.left_out,
        }

    def batches(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """(positions in `rows`, column name → (B, V, *row_shape)); reports progress."""
        row_bytes = sum(group.layout.sample_bytes for group in self.groups)
        n = max(1, BATCH_BYTES // row_bytes)
        for start in range(0, len(self.rows), n):
            where = slice(start, min(start + n, len(self.rows)))
            yield where, self._gather(self.rows[where])
            self.progress(where.stop - where.start)

    def _gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        n_views = self.store.n_views
        rows, views = np.repeat(rows, n_views), np.tile(np.arange(n_views), len(rows))
        gathered: dict[str, np.ndarray] = {}
        for group in self.groups:
            arrays = group.gather(rows, views)
            if self.decode:
                arrays = decoded(group.codec, arrays, rows, views)
            for name, values in arrays.items():
                gathered[f"{group.path}/{name}"] = values.reshape(-1, n_views, *values.shape[1:])
        return gathered


def make_content(store: Store, groups: list[str], rows: str, decode: bool) -> Content:
    """The content that the command line names. Raises UserError for rows outside the store or no group at all."""
    names = list(dict.fromkeys(groups)) or store.groups()
    if not names:
        raise UserError(f"{store.root} has no group to export; precompute or import one first")
    start, colon, stop = rows.partition(":")
    try:
        span = range(int(start or 0), int(stop or store.n_rows))
    except ValueError:
        span = range(0)
    if not colon or not span or span.start < 0 or span.stop > store.n_rows:
        raise UserError(f"--rows is A:B with 0 ≤ A < B ≤ {store.n_rows}, got {rows!r}")
    opened = [store.group(name) for name in names]
    failed = sorted({int(row) for group in opened for row in group.failed_rows if int(row) in span})
    kept = np.setdiff1d(np.arange(span.start, span.stop), failed)
    if not len(kept):
        raise UserError(f"--rows {rows!r} holds no sample that could be encoded; name others")
    index = Index(store.index.table.take(kept))
    return Content(store=store, groups=opened, rows=kept, left_out=failed, index=index, decode=decode)
