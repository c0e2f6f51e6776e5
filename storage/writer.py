"""Making a store and publishing units into it.

Order of publication, which is what makes every crash harmless: the index, then the root's metadata; a group's metadata
as one renamed directory; then, a unit at a time, its shards and last its receipt. Metadata is written by zarr-python.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from storage.errors import StoreError
from storage.files import fsync_directory, make_directories, partial_name, publish
from storage.identity import identity_digest, require_same
from storage.index import Index, write_index
from storage.layout import FORMAT_VERSION, GROUP_KINDS, GroupLayout, StoreLayout
from storage.receipts import Failure, Receipt, why_not_done, write_receipt
from storage.shard import write_shard
from storage.staging import staging_directory

__all__ = ["Failure", "create_group", "create_store", "publish_unit"]

NEW_ROOT = "use another STORE, or the options it was made with"


def create_store(root: Path, layout: StoreLayout, index: Index, source: Mapping[str, Any], run_id: str) -> None:
    """Make the store, or check that the one at `root` is of the same samples, resolution, views and shard size.

    `source` is provenance (which kind, which path). The run's `Staging` is held. Raises StoreError naming every field
    that differs.
    """
    attributes = {
        "format_version": FORMAT_VERSION,
        "n_rows": layout.n_rows,
        "views": list(layout.views),
        "resolution": layout.resolution,
        "shard_rows": layout.shard_rows,
        "index_digest": index.digest(),
    }
    if (root / "zarr.json").exists():
        found = dict(zarr.open_group(root, mode="r").attrs)
        found.pop("source", None)
        require_same(attributes, found, f"store {root}", NEW_ROOT)
        return
    write_index(root, index, run_id)
    for kind in GROUP_KINDS:
        _publish_node(root / kind, {}, None, run_id)
    _publish_root(root, {**attributes, "source": dict(source)}, run_id)


def create_group(
    root: Path, layout: GroupLayout, identity: Mapping[str, Any], provenance: Mapping[str, Any], run_id: str
) -> str:
    """Make the group, or check that the one there has this identity; returns the identity digest.

    Raises StoreError naming the fields that differ, so that a run under another identity never mixes in.
    """
    path = root / layout.path
    digest = identity_digest(identity)
    if not (path / "zarr.json").exists():
        attributes = {
            "format_version": FORMAT_VERSION,
            "identity": dict(identity),
            "identity_digest": digest,
            "provenance": dict(provenance),
        }
        _publish_node(path, attributes, layout, run_id)
    found = dict(zarr.open_group(path, mode="r").attrs)
    recorded: Any = found.get("identity", {})
    require_same(identity, recorded, f"{path}", "use another STORE, or remove that group to encode it again")
    return digest


def publish_unit(
    root: Path,
    layout: GroupLayout,
    digest: str,
    unit: int,
    arrays: Mapping[str, np.ndarray],
    failed: Sequence[Failure],
    run_id: str,
    timings_s: Mapping[str, float],
) -> Receipt:
    """Publish one unit: every array's shard, then the receipt.

    `arrays` maps each array's name to (n, V, *row_shape), n = rows of the unit, of the layout's dtype. Rows named in
    `failed` are left empty. Publishing a unit again writes the same bytes. Raises StoreError as `write_shard` does.
    """
    rows = layout.store.unit_rows(unit)
    present = np.ones(len(rows), dtype=bool)
    present[[failure.row - rows.start for failure in failed]] = False
    staging = staging_directory(root, layout.path, run_id)
    start_s = time.perf_counter()
    shards = tuple(
        write_shard(root / layout.path, array, unit, np.ascontiguousarray(arrays[array.name]), present, staging)
        for array in layout.arrays
    )
    receipt = Receipt(
        identity_digest=digest,
        unit=unit,
        rows=(rows.start, rows.stop),
        shards=shards,
        failed=tuple(sorted(failed, key=lambda failure: failure.row)),
        timings_s={**timings_s, "publish": round(time.perf_counter() - start_s, 4)},
    )
    reason = why_not_done(root, layout, unit, digest, receipt)
    if reason is not None:
        raise StoreError(f"unit {unit} of {layout.path} was published but {reason}; is another program writing here?")
    write_receipt(root, layout, receipt, run_id)
    return receipt


def _publish_node(path: Path, attributes: Mapping[str, Any], layout: GroupLayout | None, run_id: str) -> None:
    """A Zarr group, with the layout's arrays when given, made aside and renamed into place; the first writer wins."""
    make_directories(path.parent)
    aside = partial_name(path, run_id)
    try:
        group = zarr.create_group(aside, zarr_format=3, attributes=dict(attributes))
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
            )
        for directory, _, files in os.walk(aside):
            for name in files:
                with open(Path(directory) / name, "rb") as file:
                    os.fsync(file.fileno())
            fsync_directory(Path(directory))
        try:
            publish(aside, path)
        except OSError:
            if not (path / "zarr.json").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish_root(root: Path, attributes: Mapping[str, Any], run_id: str) -> None:
    """The root's own `zarr.json`, last: with it the directory becomes a store."""
    aside = partial_name(root / "zarr.json", run_id)
    try:
        zarr.create_group(aside, zarr_format=3, attributes=dict(attributes))
        with open(aside / "zarr.json", "rb") as file:
            os.fsync(file.fileno())
        publish(aside / "zarr.json", root / "zarr.json")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
