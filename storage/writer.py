"""Making a store and publishing units into it.

Order of publication, which is what makes every crash harmless: the index and its receipt, then the root's metadata; a
group's attributes, which claim its name for one identity, its arrays' metadata, the receipt of both; then, a unit at a
time, its shards and last its receipt. Metadata is spelled by zarr-python, in memory, and published like all else: what
makes one file whole or absent is in `roots.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from storage.base.errors import StoreError
from storage.identity import Identity, require_same
from storage.index import Index, index_bytes
from storage.layout import FORMAT_VERSION, GROUP_KINDS, INDEX_FILE, METADATA, STORE_RECEIPT, GroupLayout, StoreLayout
from storage.metadata import node_metadata, read_attributes, typed_attributes
from storage.receipts import (
    Failure,
    Receipt,
    ShardRecord,
    check_metadata,
    why_not_done,
    write_metadata_receipt,
    write_receipt,
)
from storage.roots import Root, open_root
from storage.schema import GroupAttributes, Made
from storage.shard import write_shard

__all__ = ["Failure", "create_group", "create_store", "publish_unit"]

NEW_ROOT = "use another STORE, or the options it was made with"
NEW_GROUP = "use another STORE, or remove that group to encode it again"


def create_store(
    where: str | os.PathLike[str] | Root, layout: StoreLayout, index: Index, source: Mapping[str, Any], run_id: str
) -> None:
    """Make the store, or check that the one there is of the same samples, resolution, views and shard size.

    `source` is provenance (which kind, which path). The run's `Staging` is held. Raises StoreError naming every field
    that differs.
    """
    root = open_root(where)
    attributes = _store_attributes(layout, index)
    stored = check_store(root, layout, index)
    if stored is not None:
        if not _sealed(root, STORE_RECEIPT):
            _publish_store(root, {**attributes, "source": stored.get("source", {})}, index, run_id)
        return
    _publish_store(root, {**attributes, "source": dict(source)}, index, run_id)


def check_store(root: Root, layout: StoreLayout, index: Index) -> dict[str, Any] | None:
    """The attributes of the store there is, None when there is none; raises StoreError as `create_store` does."""
    stored = read_attributes(root, METADATA)
    if stored is not None:
        without_source = {name: value for name, value in stored.items() if name != "source"}
        require_same(_store_attributes(layout, index), without_source, f"store {root}", NEW_ROOT)
    return stored


def check_group(root: Root, path: str, identity: Identity, fix: str = NEW_GROUP) -> None:
    """Raise StoreError as `create_group` does when there is a group of another identity; `fix` ends the sentence."""
    stored = read_attributes(root, f"{path}/{METADATA}")
    if stored is not None:
        stored_identity = typed_attributes(GroupAttributes, stored, root.at(f"{path}/{METADATA}")).identity
        require_same(identity.plain(), stored_identity, root.at(path), fix)


def create_group(
    where: str | os.PathLike[str] | Root,
    layout: GroupLayout,
    identity: Identity,
    provenance: Mapping[str, Any],
    run_id: str,
    *,
    more: Mapping[str, Any] | None = None,
) -> str:
    """Make the group, or check that the one there has this identity; returns the identity digest.

    `more` are attributes beside those that every group has. Raises StoreError naming the fields that differ, so that a
    run under another identity never mixes in. Metadata that a killed run left unfinished is completed.
    """
    root = open_root(where)
    digest = identity.digest
    attributes = {
        "format_version": FORMAT_VERSION,
        "identity": identity.plain(),
        "identity_digest": digest,
        "provenance": dict(provenance),
        **(more or {}),
    }
    group, *arrays = node_metadata(layout.path, attributes, layout).items()
    if read_attributes(root, group[0]) is None:
        with contextlib.suppress(FileExistsError):  # another run was first: what it wrote is checked like any other
            root.write(group[0], [group[1]], run_id, exclusive=True)
    check_group(root, layout.path, identity)
    if not _sealed(root, layout.metadata_receipt_key(layout.path)):
        for key, raw in arrays:
            root.write(key, [raw], run_id)
        write_metadata_receipt(
            root, layout.metadata_receipt_key(layout.path), {group[0]: root.read(group[0]), **dict(arrays)}, run_id
        )
    return digest


def publish_unit(
    where: str | os.PathLike[str] | Root,
    layout: GroupLayout,
    digest: str,
    unit: int,
    arrays: Mapping[str, np.ndarray],
    failed: Sequence[Failure],
    run_id: str,
    timings_s: Mapping[str, float],
    *,
    statistics: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
    sample_crc32c: np.ndarray | None = None,
    replaces: Receipt | None = None,
    fsync: bool = True,
) -> Receipt:
    """Publish one unit: every array's shard, then the receipt.

    `arrays` maps each array's name to (n, V, *row_shape), n = rows of the unit, of the layout's dtype. Rows named in
    `failed` are left empty. Publishing a unit again writes the same bytes. `statistics` and `made` are kept in the
    receipt, and so is `sample_crc32c`, uint32 (n,), of the bytes that the rows were made of. `fsync=False` trusts the
    kernel to write back: quicker on slow disks, and after a power cut (not a crash of the program) `verify --deep` is
    advised. Raises StoreError as `write_shard` does.

    `replaces` is the receipt of a unit that is done again, with other rows. It is taken back first (a receipt without
    shards, which is not done), so that it never speaks of the new bytes, and what is on record of it (its run, when,
    and the rows that had failed) goes into the new one.
    """
    root = open_root(where)
    rows = layout.store.unit_rows(unit)
    assert all(failure.row in rows for failure in failed), (unit, failed)
    present = np.ones(len(rows), dtype=bool)
    present[[failure.row - rows.start for failure in failed]] = False
    record: dict[str, Any] = {}
    if replaces is not None:
        if replaces.shards:
            write_receipt(root, layout, dataclasses.replace(replaces, shards=()), run_id, fsync=fsync)
        before = {name: replaces.made[name] for name in ("run", "finished_unix_s") if name in replaces.made}
        record = {"replaces": {**before, "failed": [failure.row for failure in replaces.failed]}}
    start_s = time.perf_counter()
    shards = tuple(
        write_shard(
            root, layout.path, array, unit, np.ascontiguousarray(arrays[array.name]), present, run_id, fsync=fsync
        )
        for array in layout.arrays
    )
    receipt = Receipt(
        identity_digest=digest,
        unit=unit,
        rows=(rows.start, rows.stop),
        shards=shards,
        failed=tuple(sorted(failed, key=lambda failure: failure.row)),
        timings_s={**timings_s, "publish": round(time.perf_counter() - start_s, 4)},
        statistics=dict(statistics or {}),
        made=cast(Made, {"run": run_id, "finished_unix_s": round(time.time(), 3), **(made or {}), **record}),
        sample_crc32c="" if sample_crc32c is None else ShardRecord.pack(sample_crc32c),
    )
    reason = why_not_done(root, layout, unit, digest, receipt, None)
    if reason is not None:
        raise StoreError(f"unit {unit} of {layout.path} was published but {reason}; is another program writing here?")
    write_receipt(root, layout, receipt, run_id, fsync=fsync)
    return receipt


def _sealed(root: Root, key: str) -> bool:
    """Whether metadata was published to the end and is as it was then."""
    try:
        return not check_metadata(root, key)[1]
    except StoreError:
        return False


def _store_attributes(layout: StoreLayout, index: Index) -> dict[str, Any]:
    """All that a store's metadata must agree on; its source is provenance."""
    return {
        "format_version": FORMAT_VERSION,
        "n_rows": layout.n_rows,
        "views": list(layout.views),
        "resolution": layout.resolution,
        "shard_rows": layout.shard_rows,
        "index_digest": index.digest(),
    }


def _publish_store(root: Root, attributes: Mapping[str, Any], index: Index, run_id: str) -> None:
    """The root's own `zarr.json` goes last: with it the directory becomes a store."""
    files = {INDEX_FILE: index_bytes(index)}
    for kind in GROUP_KINDS:
        files |= node_metadata(kind, {}, None)
    last = node_metadata("", attributes, None)
    for key, raw in files.items():
        root.write(key, [raw], run_id)
    write_metadata_receipt(root, STORE_RECEIPT, {**files, **last}, run_id)
    for key, raw in last.items():
        root.write(key, [raw], run_id)
