"""Arrays that another program laid out in its own way, read by zarr-python behind the same calls as ours.

For compressed, differently chunked or unsharded arrays: right, and slower by orders of magnitude, which a warning says
once an array. Checksums are whatever the array's own codecs check.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr

from storage.base.errors import StoreError
from storage.base.shown import shown
from storage.layout import checked_rows, sample_in_words
from storage.roots import Root
from storage.schema import MAX_ROWS, MAX_SAMPLE_BYTES

MAX_CHUNK_BYTES = 1 << 30
METADATA_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
RUNS_CODE = ("pickle",)  # numcodecs' codecs that would run what a chunk tells them to


def open_foreign(root: Root, name: str) -> Any:
    """The zarr-python array at a key. Raises StoreError when there is none, or none of numbers within bounds.

    Its metadata are looked at before zarr-python opens them: a pipe there would be waited for.
    """
    where = root.at(name)
    for file in METADATA_FILES:
        with contextlib.suppress(FileNotFoundError):
            root.read(f"{name}/{file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = zarr.open_array(root.zarr_store(), path=name, mode="r")
        shape, chunks, dtype = tuple(map(int, array.shape)), tuple(map(int, array.chunks)), array.dtype
        codecs = json.dumps(array.metadata.to_dict(), default=str)
    except Exception as error:  # whatever foreign metadata makes of its interpreter
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise StoreError(f"{where} is not a Zarr array ({first}); name the folder that holds its zarr.json") from error
    if dtype.kind not in "biuf":
        raise StoreError(f"{where} holds {dtype}; samples are numbers")
    if any(f'"{codec}"' in codecs for codec in RUNS_CODE):
        raise StoreError(
            f"{where} is encoded by a codec that can run code ({', '.join(RUNS_CODE)}); store it as numbers"
        )
    if max(shape, default=0) >= MAX_ROWS or math.prod(shape[2:]) * dtype.itemsize > MAX_SAMPLE_BYTES:
        raise StoreError(f"{where} says that it has shape {shape}, more than is believed of samples")
    if math.prod(chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise StoreError(f"{where} has chunks of shape {chunks}, more than {MAX_CHUNK_BYTES:,} bytes; cut it smaller")
    return array


class ZarrArrayReader:
    """One zarr-python array (N, V, *row_shape), read by rows."""

    def __init__(self, array: Any, where: str) -> None:
        self._array, self._where = array, where
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.row_shape = self.shape[2:]
        self.dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
        codecs = getattr(array.metadata, "codecs", array.metadata)
        warnings.warn(
            f"{shown(where)} is not laid out as this format's arrays ({codecs}); zarr-python reads it, slowly. "
            "Copy it into shards of whole rows with crc32c and no compressor to read it at full speed",
            stacklevel=3,
        )

    def __repr__(self) -> str:
        rows, views = self.shape[:2]
        sample = sample_in_words(self.row_shape, self.dtype)
        return f"<{type(self).__name__} {shown(self._where)}: {rows:,} rows, {views} views, each {sample}>"

    def read_into(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int, out: np.ndarray) -> None:
        """As `ArrayReader.read_into`."""
        rows, views = checked_rows(rows, views, self.shape)
        if out.shape != (len(rows), *self.row_shape) or out.dtype != self.dtype:
            raise ValueError(f"out must be {self.dtype} {(len(rows), *self.row_shape)}, got {out.dtype} {out.shape}")
        views = np.broadcast_to(views, rows.shape)
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            try:
                out[i] = self._array[row, view]
            except Exception as error:  # a chunk that its codecs cannot read
                first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                raise StoreError(f"{self._where}, row {row}, view {view} cannot be read ({first})") from error

    def will_read(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is held open."""
