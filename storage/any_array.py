"""Opening one Zarr array of samples, whoever wrote it: no store, index or receipts are needed."""

from __future__ import annotations

import os
from functools import partial

from storage.base.errors import StoreError
from storage.checks import ChecksumPolicy
from storage.foreign import ZarrArrayReader, open_foreign
from storage.gather import ArrayReader
from storage.layout import ArrayLayout, StoreLayout
from storage.metadata import reads_as_ours
from storage.opened_array import EmptyRows, OpenArray
from storage.reader import DEFAULT_THREADS
from storage.roots import absolute, open_root

RowReader = ArrayReader | ZarrArrayReader
VIEWS = ("original", "hflip")
MAX_SHARDS, MAX_SHARD_CHUNKS = 1 << 27, 1 << 25  # of an array without receipts


def open_array(
    where: str | os.PathLike[str],
    *,
    checksums: ChecksumPolicy = "first",
    n_threads: int = DEFAULT_THREADS,
    empty: EmptyRows = "refuse",
) -> RowReader:
    """Any Zarr array (N, V, *row_shape) at a path or URL, by rows; no store, index or receipts are needed.

    Arrays with one sample of one view an inner chunk, sharded whole rows at a time, with crc32c and no compressor, are
    read by the same engine as ours, whoever wrote them. A row that is not there is an error, as it may have failed;
    some writers leave out rows of zeros, and `empty="fill"` reads them as that. Others are read by zarr-python, which
    always fills, with a warning, since it is slower by orders of magnitude. Raises StoreError when there is no array.

    >>> from storage import open_array
    >>> open_array("stores/photos/latents/tiny-vae/moments")
    <ArrayReader moments: 1,152 rows, 1 view, each 8×16×16 float16>
    """
    parent, _, name = absolute(where).rpartition("/")
    root = open_root(parent)
    array = open_foreign(root, name)
    if len(array.shape) < 3 or 0 in array.shape:
        raise StoreError(f"{root.at(name)} has shape {array.shape}; samples lie as (rows, views, axes of a sample…)")
    n_views = array.shape[1]
    if array.shards is not None and n_views <= len(VIEWS):
        # Names of views and the resolution are a store's matter; the geometry of an array does not depend on them.
        store = StoreLayout(n_rows=array.shape[0], views=VIEWS[:n_views], resolution=8, shard_rows=array.shards[0])
        layout = ArrayLayout(name=name, dtype=array.dtype.str, row_shape=tuple(array.shape[2:]), store=store)
        if store.n_units > MAX_SHARDS or layout.n_shard_chunks > MAX_SHARD_CHUNKS:
            raise StoreError(f"{root.at(name)} says that it has {store.n_units} shards of {store.shard_rows} rows")
        if reads_as_ours(array, layout):
            open_here = partial(OpenArray, path=name, checksums=checksums, n_threads=n_threads, empty=empty)
            return ArrayReader(partial(open_here, root, None, layout))
    return ZarrArrayReader(array, root.at(name))
