"""Arrays that another program laid out in its own way, read by zarr-python behind the same calls as ours.

For compressed, differently chunked or unsharded arrays: right, and slower by orders of magnitude, which a warning says
once an array. Checksums are whatever the array's own codecs check.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.layout import checked_rows


class ZarrArrayReader:
    """One zarr-python array (N, V, *row_shape), read by rows."""

    def __init__(self, array: Any, where: str) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.row_shape = self.shape[2:]
        self.dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
        codecs = getattr(array.metadata, "codecs", array.metadata)
        warnings.warn(
            f"{where} is not laid out as this format's arrays ({codecs}); zarr-python reads it, slowly. "
            "Copy it into shards of whole rows with crc32c and no compressor to read it at full speed",
            stacklevel=3,
        )

    def read_into(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int, out: np.ndarray) -> None:
        """As `ArrayReader.read_into`."""
        rows, views = checked_rows(rows, views, self.shape)
        if out.shape != (len(rows), *self.row_shape) or out.dtype != self.dtype:
            raise ValueError(f"out must be {self.dtype} {(len(rows), *self.row_shape)}, got {out.dtype} {out.shape}")
        views = np.broadcast_to(views, rows.shape)
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            out[i] = self._array[row, view]

    def will_read(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is held open."""
