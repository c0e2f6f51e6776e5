"""Zarr metadata: `zarr.json` files as zarr-python spells them, made in memory, and read by the types of `schema.py`.

The bytes are published by `writer.py` like everything else, so that a crash leaves whole files, and they are the same
for the same layout and attributes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from storage.base.boundary import parse_json
from storage.base.errors import StoreError, UserError
from storage.codecs import TOKENS, codec_of
from storage.identity import OF_GROUPS, Identity, canonical_json, parse
from storage.layout import METADATA, ArrayLayout, GroupLayout, StoreLayout
from storage.roots import Root
from storage.schema import MAX_SAMPLE_BYTES, ArrayNode, GroupNode

T = TypeVar("T")
NUMBERS = ("moments", "cls")  # arrays whose numbers are computed with, but for a codec's
RESTORE = "restore it, or use another copy of the store"


def read_attributes(root: Root, key: str) -> dict[str, Any] | None:
    """The attributes in a group's `zarr.json` at `key`, or None when there is none. Raises StoreError when damaged."""
    try:
        raw = root.read(key)
    except FileNotFoundError:
        return None
    attributes = parse_json(GroupNode, raw, root.at(key), RESTORE).attributes
    try:
        canonical_json(attributes).encode()
    except ValueError as error:  # NaN and infinity, which no JSON has, and halves of characters
        raise StoreError(f"{root.at(key)} is damaged ({error}); {RESTORE}") from None
    return attributes


def typed_attributes(kind: type[T], attributes: Mapping[str, Any], where: str) -> T:
    """Attributes as an object of `kind`. Raises StoreError naming the first that is not as it should be."""
    return parse_json(kind, json.dumps(attributes), where, RESTORE)


def read_array_layout(root: Root, path: str, store: StoreLayout) -> ArrayLayout:
    """The layout of an array of ours, from its `zarr.json`. Raises StoreError when it is none, or not of this store."""
    where, name = root.at(path), path.rpartition("/")[2]
    try:
        raw = root.read(f"{path}/{METADATA}")
    except FileNotFoundError:
        raise StoreError(f"{where}/{METADATA} is missing; {RESTORE}") from None
    node = parse_json(ArrayNode, raw, f"{where}/{METADATA}", RESTORE)
    row_shape = node.shape[2:]
    if node.shape[:2] != (store.n_rows, store.n_views) or 0 in row_shape:
        raise StoreError(
            f"{where} has shape {node.shape}, the store's has {store.n_rows} rows and {store.n_views} views; {RESTORE}"
        )
    layout = ArrayLayout(name=name, dtype=np.dtype(node.data_type).str, row_shape=row_shape, store=store)
    if layout.chunk_bytes > MAX_SAMPLE_BYTES:
        raise StoreError(
            f"{where} has samples of {layout.chunk_bytes:,} bytes, no array of this format more than "
            f"{MAX_SAMPLE_BYTES:,}; {RESTORE}"
        )
    try:
        memory = MemoryStore({METADATA: default_buffer_prototype().buffer.from_bytes(raw)})
        ours = reads_as_ours(zarr.open_array(memory, mode="r"), layout)
    except Exception as error:  # whatever an edited field makes of the interpreter: it has had only these bytes
        raise StoreError(
            f"{where}/{METADATA} is not the metadata of a Zarr v3 array ({_first(error)}); {RESTORE}"
        ) from error
    if not ours:
        raise StoreError(f"{where} is not laid out as this format's arrays; read it by open_array")
    return layout


def group_identity(path: str, stored: Mapping[str, Any], where: str) -> Identity:
    """The identity of the group at `path`. Raises StoreError naming the first field that is not as it should be."""
    return parse(OF_GROUPS[path.partition("/")[0]], stored, f"{where}: the identity", RESTORE)


def check_identity(layout: GroupLayout, identity: Identity, where: str) -> None:
    """Raise StoreError when the arrays are not what the identity describes; who opens a group computes with both."""
    shapes = identity.row_shapes()
    arrays = {array.name: array.row_shape for array in layout.arrays}
    try:
        codec = codec_of(identity)
    except StoreError:
        return  # a later version's: whoever decodes says so
    dtypes = dict.fromkeys(NUMBERS, "float16")
    if TOKENS in arrays:
        try:
            stored = codec.arrays(*(shapes.get(TOKENS) or codec.tokens_shape(arrays[TOKENS])))
        except (UserError, TypeError) as error:  # the latter for a shape with other axes
            raise StoreError(
                f"{where}/{TOKENS} {arrays[TOKENS]} are no {codec.spelling} tokens ({error}); {RESTORE}"
            ) from None
        for name, (dtype, shape) in stored.items():
            if name not in arrays:
                raise StoreError(f"{where} has {codec.spelling} {TOKENS} and no {name}; {RESTORE}")
            dtypes[name], shapes[name] = dtype, shape
    for array in layout.arrays:
        if not _alike(np.dtype(array.dtype), np.dtype(dtypes.get(array.name, array.dtype))):
            raise StoreError(
                f"{where}/{array.name} holds {array.dtype}, which its identity does not describe; {RESTORE}"
            )
    for name in arrays.keys() & shapes.keys():
        if arrays[name] != shapes[name]:
            raise StoreError(
                f"{where}/{name} has samples of shape {arrays[name]}, the identity says {shapes[name]}; {RESTORE}"
            )


def _alike(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    """Whether both are floating-point numbers, of any size, or the same integers."""
    return a.kind == b.kind and (a.kind == "f" or a.itemsize == b.itemsize)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__


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
    buffer = asyncio.run(memory.get(name, default_buffer_prototype()))
    assert buffer is not None, name
    return buffer.to_bytes()
