"""Zarr metadata: `zarr.json` files as zarr-python spells them, made in memory; attributes as it reads them.

The bytes are published by `writer.py` like everything else, so that a crash leaves whole files, and they are the same
for the same layout and attributes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from storage.errors import StoreError
from storage.layout import METADATA, ArrayLayout, GroupLayout
from storage.roots import Root


def read_attributes(root: Root, key: str) -> dict[str, Any] | None:
    """The attributes in a group's `zarr.json` at `key`, or None when there is none. Raises StoreError when damaged."""
    try:
        root.read(key)
    except FileNotFoundError:
        return None
    try:
        path = key.removesuffix(METADATA).rstrip("/")
        return dict(zarr.open_group(root.zarr_store(), path=path, mode="r", zarr_format=3).attrs)
    except (ValueError, TypeError, KeyError, zarr.errors.BaseZarrError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{root.at(key)} is not the metadata of a Zarr v3 group ({first}); restore it") from error


def node_metadata(path: str, attributes: Mapping[str, Any], layout: GroupLayout | None) -> dict[str, bytes]:
    """Key → bytes of the `zarr.json` of a group, first, and of the layout's arrays when given."""
    memory = MemoryStore()
    group = zarr.create_group(memory, zarr_format=3, attributes=dict(attributes))
    for array in layout.arrays if layout else ():
        group.create_array(
            array.name,
            shape=array.shape,
            shards=array.shard_shape,
            chunks=array.chunk_shape,
            dtype=array.dtype,
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            dimension_names=["row", "view", *(f"{array.name}_{axis}" for axis in range(len(array.row_shape)))],
        )
    names = [METADATA, *(f"{array.name}/{METADATA}" for array in (layout.arrays if layout else ()))]
    return {f"{path}/{name}".lstrip("/"): _stored(memory, name) for name in names}


def reads_as_ours(array: Any, layout: ArrayLayout) -> bool:
    """Whether a zarr-python array lies on disk as `layout` says, whatever order its chunks were written in.

    Shards of S whole rows at the default chunk keys, one sample of one view an inner chunk, little-endian and crc32c,
    the index likewise and at the end, zero where nothing was written.
    """
    metadata = array.metadata
    codecs: Any = getattr(metadata, "codecs", ())
    if array.metadata.zarr_format != 3 or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return False
    sharding = codecs[0]
    keys = metadata.chunk_key_encoding
    return (
        _plain_with_crc32c(sharding.codecs)
        and _plain_with_crc32c(sharding.index_codecs)
        and str(getattr(sharding.index_location, "value", sharding.index_location)) == "end"
        and tuple(sharding.chunk_shape) == layout.chunk_shape
        and tuple(metadata.chunk_grid.chunk_shape) == layout.shard_shape
        and tuple(array.shape) == layout.shape
        and (keys.name, keys.separator) == ("default", "/")
        and array.fill_value == 0
    )


def _plain_with_crc32c(codecs: Any) -> bool:
    if [type(codec) for codec in codecs] != [BytesCodec, Crc32cCodec]:
        return False
    endian = codecs[0].endian
    return endian is None or str(getattr(endian, "value", endian)) == "little"


def _stored(memory: MemoryStore, name: str) -> bytes:
    found = asyncio.run(memory.get(name, default_buffer_prototype()))
    assert found is not None, name
    return found.to_bytes()
