"""Why publishing is ours: what the pinned zarr-python and zarrs do when they write a shard, and what ours does.

Each test states a fact that a design decision rests on; when a new version changes one, the decision may be looked at.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from storage import Staging, StoreLayout, create_group, create_store, open_store, publish_unit
from storage.index import make_index
from tests.stores import LATENTS, make_identities, make_layouts

SHAPE, CHUNK = (8, 16), (1, 16)


def sharded(path: Path, **options: object) -> zarr.Array:
    return zarr.create_array(path, shape=SHAPE, shards=SHAPE, chunks=CHUNK, dtype="float32", **options)  # type: ignore[arg-type]


def shard_of(path: Path) -> Path:
    return path / "c" / "0" / "0"


def test_zarr_python_renames_a_shard_into_place_and_zarrs_writes_into_the_old_one(tmp_path: Path) -> None:
    inodes = {}
    for name, pipeline in (("zarr-python", None), ("zarrs", "zarrs.ZarrsCodecPipeline")):
        path = tmp_path / name
        sharded(path, compressors=None)
        with zarr.config.set({} if pipeline is None else {"codec_pipeline.path": pipeline}):
            array = zarr.open_array(path, mode="r+")
            array[:] = 1
            before = shard_of(path).stat().st_ino
            array[:] = 2
            inodes[name] = (before, shard_of(path).stat().st_ino)
        assert zarr.open_array(path)[0, 0] == 2
    assert inodes["zarr-python"][0] != inodes["zarr-python"][1]
    assert inodes["zarrs"][0] == inodes["zarrs"][1]  # so a crash in the middle leaves a torn shard


def test_a_damaged_shard_cannot_be_mended_in_part_through_the_codec(tmp_path: Path) -> None:
    array = sharded(tmp_path / "a", compressors=None)
    array[:] = 1
    raw = bytearray(shard_of(tmp_path / "a").read_bytes())
    raw[-1] ^= 1  # of the index's checksum
    shard_of(tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        array[0] = 2  # it reads the old shard first


def test_the_default_checksum_covers_the_index_only(tmp_path: Path) -> None:
    for name, compressors, found in (("default", None, False), ("ours", [Crc32cCodec()], True)):
        array = sharded(tmp_path / name, compressors=compressors)
        array[:] = 1
        raw = bytearray(shard_of(tmp_path / name).read_bytes())
        raw[0] ^= 1
        shard_of(tmp_path / name).write_bytes(raw)
        if found:
            with pytest.raises(ValueError, match="checksum"):
                array[0]
        else:
            assert array[0][0] != 1  # wrong, without a word


def test_what_is_all_fill_value_is_not_written_and_ours_is(tmp_path: Path) -> None:
    array = sharded(tmp_path / "a", compressors=None, fill_value=0)
    array[:] = 0
    assert not shard_of(tmp_path / "a").exists()
    publish(tmp_path / "store", np.zeros((4, 1, 8, 16, 16), np.float16))
    group = open_store(tmp_path / "store").group(LATENTS)
    out = np.ones((4, 8, 16, 16), np.float16)
    group["moments"].read_into(np.arange(4), 0, out)
    assert not out.any()


def test_ours_renames_and_mends_a_damaged_shard(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 1, 8, 16, 16)).astype(np.float16)
    publish(tmp_path, values)
    shard = tmp_path / LATENTS / "moments/c/0/0/0/0/0"
    good, before = shard.read_bytes(), shard.stat().st_ino
    shard.write_bytes(good[:-7])
    publish(tmp_path, values)
    assert shard.read_bytes() == good
    assert shard.stat().st_ino != before


def publish(root: Path, values: np.ndarray) -> None:
    store = StoreLayout(n_rows=len(values), views=("original",), resolution=128, shard_rows=len(values))
    layout = make_layouts(store)[LATENTS]
    keys = [str(row) for row in range(len(values))]
    with Staging(root) as staging:
        index = make_index(keys, [0] * len(keys), [""] * len(keys), keys, [0] * len(keys))
        create_store(root, store, index, {}, staging.run_id)
        digest = create_group(root, layout, make_identities()[LATENTS], {}, staging.run_id)
        staging.prepare(LATENTS)
        publish_unit(root, layout, digest, 0, {"moments": values}, [], staging.run_id, {})
