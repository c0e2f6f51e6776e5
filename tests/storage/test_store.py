"""A store is made once, for one data set; what differs is refused by name; what is incomplete is not opened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.roots
from storage import Staging, StoreError, StoreLayout, UserError, create_group, create_store, open_store, publish_unit
from storage.identity import differing_fields, identity_digest
from storage.index import Index, index_bytes, make_index, read_classes, read_index
from storage.layout import INDEX_FILE
from storage.receipts import read_receipt
from storage.roots import open_root
from storage.staging import STAGING_DIR
from tests.stores import FEATURES, LATENTS, make_identities, make_layouts, make_store, random_arrays

STORE = StoreLayout(n_rows=40, views=("original",), resolution=128, shard_rows=16)


def array_files(root: Path) -> dict[str, bytes]:
    """Every file that Zarr sees, by its path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for kind in ("latents", "features")
        for path in sorted((root / kind).rglob("*"))
        if path.is_file()
    }


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b")
    assert array_files(tmp_path / "a") == array_files(tmp_path / "b")
    make_store(tmp_path / "a")  # over itself
    assert array_files(tmp_path / "a") == array_files(tmp_path / "b")
    strays = [path for path in (tmp_path / "a").rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert strays == []


def test_index_survives_the_disk_and_its_digest_ignores_locations(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    index = open_store(tmp_path / "s").index
    assert index.keys[:3] == ["class0/00000", "class1/00001", "class2/00002"]
    assert index.labels.tolist() == [row % 5 for row in range(40)]
    assert index.class_names == [f"class{label}" for label in range(5)]
    moved = make_index(index.keys, index.labels, [f"class{n}" for n in index.labels], ["else"] * 40, [1] * 40)
    assert moved.digest() == index.digest()
    renamed = make_index(
        ["other", *index.keys[1:]], index.labels, [f"class{n}" for n in index.labels], ["else"] * 40, [1] * 40
    )
    assert renamed.digest() != index.digest()


@settings(deadline=None)
@given(labels=st.lists(st.integers(-1, 6), min_size=1, max_size=40), row_group=st.integers(1, 50))
def test_classes_are_the_indexs_however_it_is_cut_into_row_groups(labels: list[int], row_group: int) -> None:
    keys = [str(row) for row in range(len(labels))]
    names = [f"class{label}" if label >= 0 else "" for label in labels]
    index = make_index(keys, labels, names, keys, [1] * len(labels))
    with tempfile.TemporaryDirectory() as folder:
        root = open_root(folder)
        with patch("storage.index.ROW_GROUP", row_group):
            root.write(INDEX_FILE, [index_bytes(index)], "run")
            classes = read_classes(root)
        assert read_index(root).table.equals(index.table)
    assert classes.labels.dtype == np.int32
    assert classes.labels.tolist() == index.labels.tolist() == labels
    assert classes.class_names == index.class_names


def test_a_label_that_no_model_can_embed_is_refused() -> None:
    with pytest.raises(UserError, match=r"labels must be below 2\^31, got 2147483648; number the classes from 0"):
        make_index(["a"], [2**31], ["far"], ["a"], [1])


def test_an_index_without_a_column_is_named(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    table = make_index(["a"], [0], ["near"], ["a"], [1]).table.drop_columns(["key"])
    root.write(INDEX_FILE, [index_bytes(Index(table))], "run")
    for read in (read_index, read_classes):
        with pytest.raises(StoreError, match=r"index.parquet is not an index \(.*no column key.*\); restore it"):
            read(root)


def test_duplicate_keys_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="more than once: b"):
        make_index(["a", "b", "b"], [0, 0, 0], ["x"] * 3, ["", "", ""], [1, 1, 1])


def test_identity_differences_are_named() -> None:
    wanted = {"name": "dinov2-vitb14", "weights_sha256": "aa", "preprocessing": {"resize": 224}}
    found = {"name": "dinov2-vitb14", "weights_sha256": "bb", "preprocessing": {"resize": 448}}
    assert differing_fields(wanted, found) == [
        "preprocessing.resize: found 448, asked for 224",
        'weights_sha256: found "bb", asked for "aa"',
    ]
    lines = differing_fields({"name": "foundation"}, {"name": "found"}, ("a has", "b has"))
    assert lines == ['name: a has "found", b has "foundation"']
    assert identity_digest(wanted) != identity_digest(found)
    assert identity_digest(dict(reversed(wanted.items()))) == identity_digest(wanted)


def test_a_store_or_group_made_differently_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    index = read_index(open_root(root))
    other = StoreLayout(n_rows=40, views=("original",), resolution=256, shard_rows=16)
    with Staging(root) as staging:
        with pytest.raises(StoreError, match="resolution: found 128, asked for 256"):
            create_store(root, other, index, {}, staging.run_id)
        identity = replace(make_identities()[FEATURES], weights_sha256="1" * 64)
        with pytest.raises(StoreError, match="weights_sha256: found"):
            create_group(root, make_layouts(STORE)[FEATURES], identity, {}, staging.run_id)
    with pytest.raises(StoreError, match="layer"):
        open_store(root).group(FEATURES, expect=replace(make_identities()[FEATURES], layer="blocks.3"))


def test_what_is_not_a_store_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("hello")
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path / "letters")
    with pytest.raises(UserError, match="exists and is not a store"), Staging(tmp_path / "letters"):
        pass
    assert os.listdir(tmp_path / "letters") == ["a.txt"]
    make_store(tmp_path / "s")
    with pytest.raises(StoreError, match=r"has no features/clip; it has latents/tiny-vae, features/tiny-vit"):
        open_store(tmp_path / "s").group("features/clip")
    for inside in ("latents", LATENTS, f"{LATENTS}/moments", "receipts", "nothing"):
        with pytest.raises(StoreError, match=rf"/s/{inside} (is not a store|does not exist).*; the store is \S*/s$"):
            open_store(tmp_path / "s" / inside)
    (tmp_path / "s/receipts/store.json").unlink()  # still a store, and damaged
    with pytest.raises(StoreError, match=r"receipts/store\.json is missing"):
        open_store(tmp_path / "s")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match=r"other is not a store .*; name the folder that holds index.parquet"):
        open_store(tmp_path / "other")


def test_an_edited_identity_is_found(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    metadata = tmp_path / "s" / FEATURES / "zarr.json"
    fields = json.loads(metadata.read_text())
    fields["attributes"]["identity"]["layer"] = "blocks.3"
    metadata.write_text(json.dumps(fields))
    with pytest.raises(StoreError, match=r"zarr\.json was edited since it was written"):
        open_store(tmp_path / "s").group(FEATURES)


@pytest.mark.parametrize("damage", ["no receipt", "another identity", "damaged receipt", "missing shard"])
def test_a_unit_is_done_only_with_a_matching_receipt_and_its_files(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "s"
    make_store(root)
    receipt = root / "receipts" / FEATURES / "00000001.json"
    if damage == "no receipt":
        receipt.unlink()
    elif damage == "another identity":
        receipt.write_text(receipt.read_text().replace(json.loads(receipt.read_text())["identity_digest"], "f" * 64))
    elif damage == "damaged receipt":
        receipt.write_text(receipt.read_text()[:100])
    else:
        (root / FEATURES / "cls/c/1/0/0").unlink()
    store = open_store(root)
    store.group(LATENTS).close()
    with pytest.raises(StoreError, match=r"features/tiny-vit is not complete: 1 of 3 units.*unit 1"):
        store.group(FEATURES)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "No space left on device; free space"),
        (errno.EDQUOT, "Disk quota exceeded; raise the quota"),
        (errno.EACCES, "Permission denied; give this user write permission"),
        (errno.EROFS, "Read-only file system; mount the file system writable"),
        (errno.ESTALE, "Stale file handle; the network file system lost the directory"),
    ],
)
def test_a_disk_that_refuses_is_said_so_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    root = tmp_path / "s"
    make_store(root)
    before = array_files(root)
    layout = make_layouts(STORE)[FEATURES]

    def full(fd: int, buffers: object) -> None:
        os.write(fd, b"half a shard")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.roots, "write_all", full)
    with Staging(root) as staging:
        digest = create_group(root, layout, make_identities()[FEATURES], {}, staging.run_id)
        staging.prepare(FEATURES)
        arrays = {name: array[:16] for name, array in random_arrays(layout, seed=9).items()}
        with pytest.raises(StoreError, match=says):
            publish_unit(root, layout, digest, 0, arrays, [], staging.run_id, {})
        assert list((root / FEATURES / STAGING_DIR / staging.run_id).iterdir()) == []
    assert array_files(root) == before


def test_a_path_that_is_gone_is_said_so(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    layout = make_layouts(STORE)[FEATURES]
    arrays = {name: array[:16] for name, array in random_arrays(layout, seed=9).items()}
    with Staging(root) as staging:
        digest = create_group(root, layout, make_identities()[FEATURES], {}, staging.run_id)
        staging.prepare(FEATURES)
        shutil.rmtree(root / FEATURES)
        with pytest.raises(StoreError, match=r"cls/c/0/0/0: No such file.*; a directory of the store vanished"):
            publish_unit(root, layout, digest, 0, arrays, [], staging.run_id, {})
    assert not (root / FEATURES).exists()


def test_a_living_run_is_left_alone_by_another(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    with Staging(root) as first:
        first.prepare(FEATURES)
        mine = root / FEATURES / STAGING_DIR / first.run_id / "half"
        mine.write_bytes(b"being written")
        make_store(root)  # a whole other run, in this process: its own lock, its own staging
        assert mine.read_bytes() == b"being written"
    assert not mine.exists()


def test_receipts_record_what_was_written(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root, failed_rows=[3, 17])
    layout = make_layouts(STORE)[FEATURES]
    receipts = [read_receipt(open_root(root), layout, unit) for unit in range(3)]
    assert [receipt.n_done for receipt in receipts if receipt] == [15, 15, 8]
    assert [(f.row, f.key, f.reason) for r in receipts if r for f in r.failed] == [
        (3, "class3/00003", "test"),
        (17, "class2/00017", "test"),
    ]
