"""Other programs read what we write; we read what they write, at full speed where the layout is ours."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from storage import ArrayReader, StoreError, open_array, open_store
from storage.foreign import ZarrArrayReader
from tests.examples import examples
from tests.stores import FEATURES, LATENTS, make_store


def xarray_reads(group: Path, name: str) -> np.ndarray:
    return xarray.open_zarr(group, consolidated=False, zarr_format=3, mask_and_scale=False)[name].values


def test_zarr_python_tensorstore_and_zarrs_read_equal_numbers(tmp_path: Path) -> None:
    root = tmp_path / "store"
    data = make_store(root, n_rows=37, n_views=2, shard_rows=16)
    for path, arrays in data.items():
        for name, written in arrays.items():
            where = f"{path}/{name}"
            np.testing.assert_array_equal(zarr.open_array(root / where, mode="r")[:], written)
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / where)}}
            np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), written)
            np.testing.assert_array_equal(xarray_reads(root / path, name), written)
    # The zarrs pipeline replaces zarr-python's for a whole process, so it gets a process of its own.
    code = (
        "import sys, numpy as np, zarr, zarrs\n"
        "zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})\n"
        "a = zarr.open_array(sys.argv[1], mode='r')\n"
        "assert 'zarrs' in type(a._async_array.codec_pipeline).__module__.lower()\n"
        "np.save(sys.argv[2], a[:])\n"
    )
    for path, name in ((FEATURES, "patches"), (LATENTS, "moments")):
        saved = tmp_path / f"{name}.npy"
        subprocess.run([sys.executable, "-c", code, str(root / path / name), str(saved)], check=True)
        np.testing.assert_array_equal(np.load(saved), data[path][name])


def write_by_zarr(path: Path, values: np.ndarray, shard_rows: int, rng: np.random.Generator) -> None:
    shape = (shard_rows, *values.shape[1:])
    array = zarr.create_array(
        path, shape=values.shape, shards=shape, chunks=(1, 1, *values.shape[2:]), dtype=values.dtype,
        compressors=[Crc32cCodec()], filters=None, fill_value=0,
    )  # fmt: skip
    for row in rng.permutation(len(values)).tolist()[: max(1, len(values) // 2)]:  # rewrites shards in another order
        array[row] = values[row]
    array[:] = values


def write_by_tensorstore(path: Path, values: np.ndarray, shard_rows: int, rng: np.random.Generator) -> None:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = {"name": "bytes"} if values.dtype.itemsize == 1 else little
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (shard_rows, *values.shape[1:])}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": (1, 1, *values.shape[2:]),
                        "codecs": [plain, {"name": "crc32c"}],
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
        },
        "create": True,
    }
    array = tensorstore.open(spec).result()
    for row in rng.permutation(len(values)).tolist():
        array[row].write(values[row]).result()


def gather(reader: Any, rng: np.random.Generator, values: np.ndarray) -> None:
    rows = rng.integers(0, len(values), 60)
    views = rng.integers(0, values.shape[1], 60)
    out = np.full((60, *values.shape[2:]), 9, values.dtype)
    reader.read_into(rows, views, out)
    np.testing.assert_array_equal(out, values[rows, views])


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writer=st.sampled_from([write_by_zarr, write_by_tensorstore]),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 2), st.integers(1, 4), st.integers(1, 5)),
    shard_rows=st.integers(1, 7),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shards_of_other_writers_are_read_by_the_engine(
    writer: Any, shape: tuple[int, ...], shard_rows: int, dtype: str, zeros: bool, seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * 40).astype(dtype)
    if zeros:
        values[rng.integers(0, shape[0], 3)] = 0  # other writers leave out what equals the fill value
    path = tmp_path_factory.mktemp("foreign") / "array"
    writer(path, values, shard_rows, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = open_array(path, checksums="always", empty="fill")
    assert isinstance(reader, ArrayReader)
    gather(reader, rng, values)
    reader.close()


def test_a_row_that_is_not_there_is_zeros_only_when_asked_for(tmp_path: Path) -> None:
    make_store(tmp_path / "s", failed_rows=[3, *range(16, 32)])
    path = tmp_path / "s" / LATENTS / "moments"
    out = np.full((2, 8, 16, 16), 7, np.float16)
    with pytest.raises(StoreError, match=r'row 3, view 0 is empty: its writer left it out; open .* empty="fill"'):
        open_array(path).read_into([2, 3], 0, out)
    open_array(path, empty="fill").read_into([3, 20], 0, out)
    assert not out.any()
    (path / "c/1/0/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"c/1/0/0/0/0 is missing; its writer left it out"):
        open_array(path).read_into([20, 21], 0, out)


def test_damage_in_another_writers_shard_is_named(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((8, 1, 50)).astype("float32")
    write_by_tensorstore(tmp_path / "a", values, 4, np.random.default_rng(1))
    shard = tmp_path / "a/c/1/0/0"
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 4
    shard.write_bytes(raw)
    out = np.empty((8, 50), "float32")
    for policy in ("always", "first"):
        with pytest.raises(StoreError, match=r"c/1/0/0, row [4-7], view 0: wrong checksum"):
            open_array(tmp_path / "a", checksums=policy).read_into(np.arange(8), 0, out)  # type: ignore[arg-type]


LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed": {"chunks": (1, 1, 6), "shards": (4, 2, 6), "compressors": [ZstdCodec()]},
    "not sharded": {"chunks": (3, 2, 6), "compressors": None},
    "big chunks": {"chunks": (2, 1, 6), "shards": (4, 2, 6), "compressors": [Crc32cCodec()]},
    "format 2": {"chunks": (3, 2, 6), "zarr_format": 2, "compressors": None},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_fall_back_to_zarr_python_and_say_so(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((11, 2, 6)).astype("float32")
    array = zarr.create_array(tmp_path / "a", shape=values.shape, dtype=values.dtype, **LAYOUTS[name])
    array[:] = values
    with pytest.warns(UserWarning, match="zarr-python reads it, slowly"):
        reader = open_array(tmp_path / "a")
    assert isinstance(reader, ZarrArrayReader)
    gather(reader, rng, values)
    for rows, views in (([11], 0), ([-1], 0), ([0], 2)):
        with pytest.raises(IndexError):
            reader.read_into(rows, views, np.empty((1, 6), "float32"))


def test_a_group_rewritten_in_another_layout_is_refused_and_its_array_is_not(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    path = root / LATENTS / "moments"
    values = zarr.open_array(path, mode="r")[:]
    zarr.create_array(
        path, shape=values.shape, dtype=values.dtype, chunks=(1, *values.shape[1:]), compressors=[ZstdCodec()],
        overwrite=True, fill_value=0,
    )[:] = values  # fmt: skip
    with pytest.raises(StoreError, match=r"moments/zarr.json was edited"):
        open_store(root).group(LATENTS)
    with pytest.warns(UserWarning, match="slowly"):
        gather(open_array(path), np.random.default_rng(0), values)


def test_what_is_not_an_array_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a Zarr array"):
        open_array(tmp_path / "nothing")
    make_store(tmp_path / "s")
    with pytest.raises(StoreError, match="is not a Zarr array"):
        open_array(tmp_path / "s" / FEATURES)
    zarr.create_array(tmp_path / "flat", shape=(4, 5), dtype="f4")[:] = 1
    with pytest.raises(StoreError, match=r"samples lie as \(rows, views"):
        open_array(tmp_path / "flat")


def test_big_shapes_two_views_and_a_short_last_shard(tmp_path: Path) -> None:
    """512 px: 32×32 tokens of a wide model, both views, N not a multiple of the shard."""
    from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_store
    from storage.identity import FeaturesIdentity
    from storage.index import make_index
    from tests.stores import publish_all

    store = StoreLayout(n_rows=5, views=("original", "hflip"), resolution=512, shard_rows=2)
    layout = GroupLayout(
        path="features/wide",
        arrays=(ArrayLayout(name="patches", dtype="float16", row_shape=(1024, 1536), store=store),),
    )
    values = np.random.default_rng(0).standard_normal(layout.arrays[0].shape, dtype=np.float32).astype(np.float16)
    keys = [str(row) for row in range(5)]
    with Staging(tmp_path / "s") as staging:
        create_store(tmp_path / "s", store, make_index(keys, [0] * 5, ["x"] * 5, keys, [1] * 5), {}, staging.run_id)
        publish_all(tmp_path / "s", layout, FeaturesIdentity(name="wide"), {"patches": values}, keys, [], staging)
    reader = open_store(tmp_path / "s").group("features/wide")["patches"]
    pairs = np.array(list(itertools.product(range(5), range(2))))
    out = np.empty((10, 1024, 1536), np.float16)
    reader.read_into(pairs[:, 0], pairs[:, 1], out)
    np.testing.assert_array_equal(out, values.reshape(10, 1024, 1536))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s/features/wide/patches")}}
    np.testing.assert_array_equal(tensorstore.open(spec).result()[4].read().result(), values[4])
