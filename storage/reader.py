"""Opening a store: what is in it, whether it is whole, and readers for its arrays.

`open_store` reads the root's metadata only; `Store.group` reads a group's metadata and its receipts (one small file a
unit), so that a reader is handed out only for a group that is complete, and with the list of rows that were left empty.
Metadata that was edited since it was written is refused, since it decides how bytes become numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Generic

import numpy as np
from crc32c import crc32c
from numpy.typing import DTypeLike

from storage.base.errors import StoreError, UserError
from storage.base.shown import LONGEST, shown
from storage.cache import CacheConfig, group_cache
from storage.checks import ChecksumPolicy
from storage.codecs import TOKENS, Codec, StoredArray, codec_of, decoded
from storage.gather import ArrayReader, gather_into
from storage.identity import AnyIdentity, Identity, identity_digest, require_same
from storage.index import Classes, Index, count_rows, read_classes, read_index
from storage.layout import (
    ANOTHER_VERSION,
    FORMAT_VERSION,
    GROUP_KINDS,
    INDEX_FILE,
    METADATA,
    RECEIPTS_DIR,
    STORE_RECEIPT,
    GroupLayout,
    StoreLayout,
    checked_rows,
    is_group_path,
    sample_in_words,
)
from storage.metadata import (
    check_identity,
    group_identity,
    read_array_layout,
    read_attributes,
    typed_attributes,
)
from storage.opened_array import OpenArray
from storage.receipts import Failure, Receipt, check_metadata, maker, rows_crc32c, scan
from storage.roots import Root, open_root
from storage.schema import GroupAttributes, StoreAttributes
from storage.statistics import Sums, add_up
from storage.visits import Views

DEFAULT_THREADS = min(8, os.cpu_count() or 1)
FEW_ROWS = 1 << 16
REMOTE_THREADS = 32  # they wait for answers, not for the processor


class GroupReader(Generic[AnyIdentity]):
    """The arrays one encoder wrote, complete and checked against their receipts. Made by `Store.group`.

    >>> from storage import open_store
    >>> group = open_store("stores/photos").group("features/tiny-vit")
    >>> group
    <GroupReader features/tiny-vit: 1,152 rows, 1 view; cls 128 float16, patches 64×128 float16>
    >>> group.gather([0, 1], 0, ["cls"])["cls"].shape  # as stored
    (2, 128)
    >>> group.tokens([0, 1]).dtype  # patch tokens as numbers, whatever the codec
    dtype('float32')
    """

    def __init__(
        self,
        layout: GroupLayout,
        attributes: Mapping[str, Any],
        identity: AnyIdentity,
        failures: list[Failure],
        arrays: Mapping[str, ArrayReader],
        receipts: Sequence[Receipt] = (),
        rows_crc32c: int = 0,
        where: str = "",
    ) -> None:
        self.path = layout.path
        self.where = where or layout.path  # for messages: store and path
        self.layout = layout
        self.attributes = dict(attributes)
        self.identity = identity
        self.identity_digest: str = self.attributes["identity_digest"]
        self.failures = failures
        self.failed_rows = np.array(sorted(failure.row for failure in failures), dtype=np.int64)
        self.arrays = dict(arrays)
        self._receipts = receipts
        self.rows_crc32c = rows_crc32c  # of the bytes of every unit, by which something made of them tells its rows

    def __getitem__(self, name: str) -> ArrayReader:
        return self.arrays[name]

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {sample_in_words(of.row_shape, of.dtype)}" for name, of in self.arrays.items())
        failed = f", {len(self.failed_rows):,} of them empty" if len(self.failed_rows) else ""
        return shown(f"<{type(self).__name__} {self.path}: {self.layout.store}{failed}; {arrays}>")

    @cached_property
    def codec(self) -> Codec:
        """How patch tokens are stored. Raises StoreError when this code does not know."""
        return codec_of(self.identity, self.where)

    @cached_property
    def sums(self) -> tuple[dict[str, Sums], int]:
        """Of latents, (sums over all units, how many units have none). Raises StoreError where they are damaged."""
        return add_up(self.layout, self._receipts, self.identity)

    @property
    def codec_arrays(self) -> list[str]:
        """Names of the arrays that hold patch tokens; none of a group without."""
        return list(self.codec.names) if TOKENS in self.arrays else []

    def shapes(self, *, decoded: bool) -> dict[str, StoredArray]:
        """Array name → dtype and row shape, as stored, or as `storage.codecs.decoded` gives them."""
        stored = {name: StoredArray(array.dtype.str, array.row_shape) for name, array in self.arrays.items()}
        if not decoded or TOKENS not in stored:
            return stored
        patches = self.arrays[TOKENS]
        shape = self.codec.tokens_shape(patches.row_shape)
        numbers = StoredArray(self.codec.number_dtype(patches.dtype).str, shape)
        kept = [name for name in stored if name == TOKENS or name not in self.codec.names]
        return {name: numbers if name == TOKENS else stored[name] for name in kept}

    def gather(self, rows: np.ndarray, views: Views, arrays: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Samples of the named arrays, or of all, (B, *row_shape) as stored. `rows` int64 (B,); raises as reading."""
        readers = {name: self.arrays[name] for name in arrays or self.arrays}
        out = {name: np.empty((len(rows), *reader.row_shape), reader.dtype) for name, reader in readers.items()}
        gather_into([(readers[name], buffer) for name, buffer in out.items()], rows, views)
        return out

    def tokens(
        self, rows: np.ndarray | Sequence[int], views: Views = 0, *, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Patch tokens (B, T, D) as numbers, whatever the codec, of a floating-point `dtype`.

        Raises StoreError for a group without, UserError for another dtype, ValueError for rows that are no sequence of
        whole numbers, IndexError for those that are not in the group.
        """
        self.require(arrays=[TOKENS])
        rows, views = checked_rows(rows, views, self.arrays[TOKENS].shape)
        if not is_floating(dtype):
            raise UserError(
                f"tokens are floating-point numbers, got dtype {dtype!r}; ask for float16, float32 or float64"
            )
        stored = self.gather(rows, views, self.codec_arrays)
        return decoded(self.codec, stored, rows, views, dtype=dtype)[TOKENS]

    def require(self, *fields: str, arrays: Sequence[str] = ()) -> None:
        """Raise StoreError when the identity lacks one of the fields, or the group one of the arrays."""
        for field in fields:
            if getattr(self.identity, field) is None:
                raise StoreError(f"{self.path}: its identity does not say its {field}; use another copy of the store")
        for name in arrays:
            if name not in self.arrays:
                raise StoreError(f"{self.path} holds {', '.join(self.arrays)} and no {name}; choose another group")

    def close(self) -> None:
        """Close every file of every array."""
        for array in self.arrays.values():
            array.close()


class Store:
    """A store root that was opened; `index` and the groups are read when asked for.

    >>> from storage import open_store
    >>> store = open_store("stores/photos")
    >>> store.n_rows, store.n_views, store.resolution
    (1152, 1, 128)
    >>> store.index
    <Index: 1,152 samples by key, label, class_name, location, nbytes>
    >>> len(store.index.class_names), int(store.index.labels.max())
    (16, 15)
    """

    def __init__(self, root: Root, attributes: Mapping[str, Any]) -> None:
        self.root = root
        self.attributes = dict(attributes)
        about = typed_attributes(StoreAttributes, attributes, root.at(METADATA))
        self.layout = StoreLayout(
            n_rows=about.n_rows, views=about.views, resolution=about.resolution, shard_rows=about.shard_rows
        )
        self.n_rows, self.n_views = self.layout.n_rows, self.layout.n_views
        self.resolution = self.layout.resolution

    def __repr__(self) -> str:
        groups = ""
        if self.root.path is not None:  # to list a bucket takes requests
            with contextlib.suppress(OSError, StoreError):
                groups = f"; {', '.join(self.groups()) or 'no group yet'}"
        return shown(f"<{type(self).__name__} {self.root}: {self.layout}, {self.resolution} px{groups}>")

    @cached_property
    def index(self) -> Index:
        """The table of samples. Raises StoreError when it is missing or was changed since the store was made."""
        self._check_index()
        return read_index(self.root, self.n_rows)

    @cached_property
    def classes(self) -> Classes:
        """What training needs of the index, in a small part of its memory. Raises as `index`."""
        self._check_index()
        return read_classes(self.root, self.n_rows)

    def _check_index(self) -> None:
        changed = check_metadata(self.root, STORE_RECEIPT, only=INDEX_FILE)[1]
        if changed:
            raise StoreError(f"{changed[0]}; restore the store's own index")

    def _check_rows(self) -> None:
        """Raise StoreError when the metadata says more rows than the index has: time and memory go with that number.

        A few are believed, so that a damaged index does not keep `verify` from the groups.
        """
        if self.n_rows > FEW_ROWS and (n := self._n_index_rows) != self.n_rows:
            raise StoreError(f"{self.root.at(INDEX_FILE)} has {n} rows, the store {self.n_rows}; restore both")

    @cached_property
    def _n_index_rows(self) -> int:
        return count_rows(self.root)

    def groups(self) -> list[str]:
        """Paths of the groups there are, latents first: "latents/<name>", "features/<name>"."""
        return [
            f"{kind}/{name}"
            for kind in GROUP_KINDS
            for name in self.root.children(kind)
            if not name.startswith(".") and self._has(f"{kind}/{name}")
        ]

    def _what_there_is(self) -> str:
        try:
            return f"it has {', '.join(self.groups()) or 'no group yet'}"
        except StoreError:  # over http
            return "which groups there are cannot be asked there"

    def _has(self, path: str) -> bool:
        try:
            self.root.size(f"{path}/{METADATA}")
        except FileNotFoundError:
            return False
        except StoreError:  # something else lies there: opening the group says so
            return True
        return True

    def group_layout(self, path: str) -> tuple[GroupLayout, dict[str, Any]]:
        """The group's geometry and attributes as its Zarr metadata say. Raises StoreError naming what exists."""
        path = path.rstrip("/")  # as a shell completes it
        if not is_group_path(path) or not self._has(path):
            raise StoreError(f"store {self.root} has no {path}; {self._what_there_is()}")
        self._check_rows()
        where = self.root.at(path)
        files, changed = check_metadata(self.root, GroupLayout.metadata_receipt_key(path))
        if changed:
            raise StoreError(f"{changed[0]}; restore it, or remove the group to encode it again")
        attributes = read_attributes(self.root, f"{path}/{METADATA}") or {}
        if attributes.get("format_version") != FORMAT_VERSION:
            version = shown(str(attributes.get("format_version")))[:LONGEST]
            raise StoreError(f"{where} has format version {version}, not {FORMAT_VERSION}; {ANOTHER_VERSION}")
        about = typed_attributes(GroupAttributes, attributes, f"{where}/{METADATA}")
        if identity_digest(about.identity) != about.identity_digest:
            raise StoreError(f"{where}: the identity was edited, its digest no longer fits; restore zarr.json")
        names = sorted(key.split("/")[2] for key in files if key.count("/") == 3)
        if not names:
            raise StoreError(f"{where}: its metadata's receipt names no array; remove the group to encode it again")
        layout = GroupLayout(
            path=path,
            arrays=tuple(read_array_layout(self.root, f"{path}/{name}", self.layout) for name in names),
        )
        check_identity(layout, group_identity(path, about.identity, where), where)
        return layout, {**attributes, "provenance": dict(about.provenance)}

    def group(
        self,
        path: str,
        *,
        expect: Identity | None = None,
        checksums: ChecksumPolicy = "first",
        n_threads: int | None = None,
        cache: CacheConfig | None = None,
    ) -> GroupReader[Any]:
        """Open a group. Raises StoreError when it is not there, not complete, or its identity is not `expect`.

        `n_threads` gather at once (default: the cores, at most 8, or 32 for a remote root); `cache` keeps a part of a
        remote group on a local disk, and does nothing for a directory.
        """
        layout, attributes = self.group_layout(path)
        path = layout.path
        if expect is not None:
            require_same(expect.plain(), attributes["identity"], self.root.at(path), "open the group you mean")
        failures: list[Failure] = []
        receipts: list[Receipt] = []
        n_undone, first_undone, crc = 0, "", 0
        for unit, receipt, reason in scan(self.root, layout, attributes["identity_digest"]):
            if receipt is None or reason is not None:
                first_undone = first_undone or f"first unit {unit}: {reason}"
                n_undone += 1
            else:
                failures += receipt.failed
                crc = crc32c(rows_crc32c(receipt).to_bytes(4, "little"), crc)
                if path.startswith("latents/"):
                    receipts.append(dataclasses.replace(receipt, shards=(), sample_crc32c=""))  # their sums, in short
        if n_undone:
            raise StoreError(
                f"{self.root.at(path)} is not complete: {n_undone} of {self.layout.n_units} units are not done "
                f"({first_undone}); run the same `{maker(attributes)}` again to finish it"
            )
        if n_threads is None:
            n_threads = DEFAULT_THREADS if self.root.path is not None else REMOTE_THREADS
        disk_cache = None
        if cache is not None and self.root.path is None:
            disk_cache = group_cache(cache, str(self.root), layout, attributes["identity_digest"])
        arrays = {
            array.name: ArrayReader(
                partial(
                    OpenArray,
                    self.root,
                    layout,
                    array,
                    path=f"{path}/{array.name}",
                    checksums=checksums,
                    n_threads=n_threads,
                    cache=disk_cache,
                )
            )
            for array in layout.arrays
        }
        identity = group_identity(path, attributes["identity"], self.root.at(path))
        return GroupReader(layout, attributes, identity, failures, arrays, receipts, crc, self.root.at(path))


def is_floating(dtype: DTypeLike) -> bool:
    """Whether it is a type of floating-point numbers; None stands for one."""
    try:
        return np.dtype(dtype).kind == "f"
    except TypeError:
        return False


def open_store(where: str | os.PathLike[str] | Root) -> Store:
    """Open the store at a path or URL. Raises StoreError when there is none or its format is another version's.

    >>> from storage import open_store
    >>> open_store("stores/photos")
    <Store stores/photos: 1,152 rows, 1 view, 128 px; latents/tiny-vae, features/tiny-vit>
    """
    root = open_root(where)
    try:
        root.size(METADATA)
    except FileNotFoundError:
        exists = root.path is not None and root.path.exists()
        state = "is not a store (it has no zarr.json)" if exists else "does not exist"
        fix = _store_around(root) or f"make one with `make precompute DATA=… STORE={shlex.quote(str(root))}`"
        raise StoreError(f"{root} {state}; {fix}") from None
    try:
        changed = check_metadata(root, STORE_RECEIPT, only=METADATA)[1]
    except StoreError:
        if _says_it_is_a_store(root):
            raise
        fix = _store_around(root) or f"name the folder that holds {INDEX_FILE} and {RECEIPTS_DIR}"
        raise StoreError(f"{root} is not a store (its zarr.json is of something else); {fix}") from None
    if changed:
        raise StoreError(f"{changed[0]}; restore it")
    attributes = read_attributes(root, METADATA) or {}
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{root} is not a store of format version {FORMAT_VERSION} (it says {attributes.get('format_version')}); "
            "use the code that wrote it, or precompute again"
        )
    return Store(root, attributes)


def _says_it_is_a_store(root: Root) -> bool:
    try:
        return "index_digest" in (read_attributes(root, METADATA) or {})
    except StoreError:  # an array's metadata, say
        return False


def _store_around(root: Root) -> str:
    """Which store a directory lies in, as advice, or ""."""
    around = root.path.absolute().parents[:4] if root.path is not None else ()
    return next((f"the store is {path}" for path in around if (path / STORE_RECEIPT).exists()), "")
