"""Opening a store: what is in it, whether it is whole, and readers for its arrays.

`open_store` reads the root's metadata only; `Store.group` reads a group's metadata and its receipts (one small file a
unit), so that a reader is handed out only for a group that is complete, and with the list of rows that were left empty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from storage.errors import StoreError
from storage.gather import ArrayReader, ChecksumPolicy
from storage.identity import identity_digest, require_same
from storage.index import Index, read_index
from storage.layout import FORMAT_VERSION, GROUP_KINDS, ArrayLayout, GroupLayout, StoreLayout
from storage.receipts import Failure, Receipt, scan

DEFAULT_THREADS = min(8, os.cpu_count() or 1)


class GroupReader:
    """The arrays one encoder wrote, complete and checked against their receipts. Made by `Store.group`."""

    def __init__(
        self,
        root: Path,
        layout: GroupLayout,
        attributes: Mapping[str, Any],
        receipts: list[Receipt],
        checksums: ChecksumPolicy,
        n_threads: int,
    ) -> None:
        self.path = layout.path
        self.layout = layout
        self.attributes = dict(attributes)
        self.identity: dict[str, Any] = self.attributes["identity"]
        self.identity_digest: str = self.attributes["identity_digest"]
        self.receipts = receipts
        self.failures: list[Failure] = [failure for receipt in receipts for failure in receipt.failed]
        self.failed_rows = np.array(sorted(failure.row for failure in self.failures), dtype=np.int64)
        self.arrays = {array.name: ArrayReader(root, layout, array, checksums, n_threads) for array in layout.arrays}

    def __getitem__(self, name: str) -> ArrayReader:
        return self.arrays[name]

    def close(self) -> None:
        """Close every file of every array."""
        for array in self.arrays.values():
            array.close()


class Store:
    """A store root that was opened; `index` and the groups are read when asked for."""

    def __init__(self, root: Path, attributes: Mapping[str, Any]) -> None:
        self.root = root
        self.attributes = dict(attributes)
        self.layout = StoreLayout(
            n_rows=attributes["n_rows"],
            views=tuple(attributes["views"]),
            resolution=attributes["resolution"],
            shard_rows=attributes["shard_rows"],
        )
        self.n_rows, self.n_views = self.layout.n_rows, self.layout.n_views
        self.resolution = self.layout.resolution

    @cached_property
    def index(self) -> Index:
        """The table of samples. Raises StoreError when it is missing or is not the one the arrays were made with."""
        index = read_index(self.root)
        require_same(
            {"n_rows": self.n_rows, "index_digest": self.attributes["index_digest"]},
            {"n_rows": len(index), "index_digest": index.digest()},
            f"index {self.root / 'index.parquet'}",
            "restore the store's own index",
        )
        return index

    def groups(self) -> list[str]:
        """Paths of the groups there are, latents first: "latents/<name>", "features/<name>"."""
        return [
            f"{kind}/{path.parent.name}"
            for kind in GROUP_KINDS
            for path in sorted((self.root / kind).glob("[!.]*/zarr.json"))
        ]

    def group_layout(self, path: str) -> tuple[GroupLayout, dict[str, Any]]:
        """The group's geometry and attributes as its Zarr metadata say. Raises StoreError naming what exists."""
        if path not in self.groups():
            raise StoreError(f"store {self.root} has no {path}; it has {', '.join(self.groups()) or 'no group yet'}")
        group = zarr.open_group(self.root / path, mode="r")
        attributes: dict[str, Any] = dict(group.attrs)
        if attributes.get("format_version") != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {attributes.get('format_version')}, not {FORMAT_VERSION}")
        if identity_digest(attributes["identity"]) != attributes["identity_digest"]:
            raise StoreError(
                f"{self.root / path}: the identity was edited, its digest no longer fits; restore zarr.json"
            )
        arrays = tuple(_array_layout(name, array, self.layout) for name, array in sorted(group.arrays()))
        return GroupLayout(path=path, arrays=arrays), attributes

    def group(
        self,
        path: str,
        *,
        expect: Mapping[str, Any] | None = None,
        checksums: ChecksumPolicy = "first",
        n_threads: int = DEFAULT_THREADS,
    ) -> GroupReader:
        """Open a group. Raises StoreError when it is not there, not complete, or its identity is not `expect`."""
        layout, attributes = self.group_layout(path)
        if expect is not None:
            require_same(expect, attributes["identity"], str(self.root / path), "open the group you mean")
        receipts = []
        undone = []
        for unit, receipt, reason in scan(self.root, layout, attributes["identity_digest"]):
            if receipt is None or reason is not None:
                undone.append((unit, reason))
            else:
                receipts.append(receipt)
        if undone:
            unit, reason = undone[0]
            raise StoreError(
                f"{self.root / path} is not complete: {len(undone)} of {self.layout.n_units} units are not done "
                f"(first unit {unit}: {reason}); run the same `make precompute` again to finish it"
            )
        return GroupReader(self.root, layout, attributes, receipts, checksums, n_threads)


def open_store(root: str | os.PathLike[str]) -> Store:
    """Open the store at `root`. Raises StoreError when there is none or its format is another version's."""
    path = Path(root)
    if not (path / "zarr.json").exists():
        state = "does not exist" if not path.exists() else "is not a store (it has no zarr.json)"
        raise StoreError(f"{path} {state}; make one with `make precompute DATA=… STORE={path}`")
    attributes: dict[str, Any] = dict(zarr.open_group(path, mode="r").attrs)
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} is not a store of format version {FORMAT_VERSION} (it says {attributes.get('format_version')}); "
            "use the code that wrote it, or precompute again"
        )
    return Store(path, attributes)


def _array_layout(name: str, array: Any, store: StoreLayout) -> ArrayLayout:
    """The layout of an array that was written by us or by another program with the same codecs."""
    layout = ArrayLayout(name=name, dtype=array.dtype.str, row_shape=tuple(array.shape[2:]), store=store)
    codecs = array.metadata.codecs
    sharding = codecs[0] if len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) else None
    ours = (
        sharding is not None
        and [type(codec) for codec in sharding.codecs] == [BytesCodec, Crc32cCodec]
        and [type(codec) for codec in sharding.index_codecs] == [BytesCodec, Crc32cCodec]
        and str(getattr(sharding.index_location, "value", sharding.index_location)) == "end"
        and tuple(sharding.chunk_shape) == layout.chunk_shape
        and tuple(array.metadata.chunk_grid.chunk_shape) == layout.shard_shape
        and tuple(array.shape) == layout.shape
    )
    if not ours:
        raise StoreError(
            f"array {name}: shape {array.shape} or codecs {codecs} are not this format's "
            f"(shape {layout.shape}, sharding with bytes and crc32c, index at the end)"
        )
    return layout
