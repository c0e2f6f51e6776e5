"""Gathering equals the array that was written, whatever the rows, shapes, views and shard sizes."""

from __future__ import annotations

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.checks
import storage.offsets
import storage.shard_files
from storage import (
    ArrayLayout,
    GroupLayout,
    Staging,
    StoreError,
    StoreLayout,
    UserError,
    create_store,
    gather_into,
    open_store,
)
from storage.identity import FeaturesIdentity
from storage.index import make_index
from storage.offsets import IRREGULAR
from storage.shard_files import LocalFiles
from tests.examples import examples
from tests.stores import FEATURES, LATENTS, make_store, publish_all

DTYPES = ("float16", "float32", "int8", "uint8", "float64")


@st.composite
def gathers(draw: st.DrawFn) -> tuple[StoreLayout, str, tuple[int, ...], list[int], list[tuple[int, int]]]:
    store = StoreLayout(
        n_rows=draw(st.integers(1, 30)),
        views=draw(st.sampled_from([("original",), ("original", "hflip")])),
        resolution=64,
        shard_rows=draw(st.integers(1, 12)),
    )
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    failed = draw(st.lists(st.integers(0, store.n_rows - 1), max_size=3, unique=True))
    kept = [row for row in range(store.n_rows) if row not in failed]
    pairs = st.lists(st.tuples(st.sampled_from(kept), st.integers(0, store.n_views - 1)), max_size=40) if kept else None
    return store, draw(st.sampled_from(DTYPES)), shape, failed, [] if pairs is None else draw(pairs)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=gathers(), share_bytes=st.sampled_from([1, 1 << 19]))
def test_gathered_rows_equal_what_was_written_and_what_zarr_reads(
    case: tuple[StoreLayout, str, tuple[int, ...], list[int], list[tuple[int, int]]],
    share_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Alone, and beside an array of longer rows, which threads share with it at whatever place that falls."""
    store, dtype, shape, failed, pairs = case
    root = tmp_path_factory.mktemp("gather") / "store"
    layout = GroupLayout(
        path="features/any",
        arrays=(
            ArrayLayout(name="a", dtype=dtype, row_shape=shape, store=store),
            ArrayLayout(name="b", dtype=dtype, row_shape=(3, *shape), store=store),
        ),
    )
    keys = [str(row) for row in range(store.n_rows)]
    rng = np.random.default_rng(1)
    data = {array.name: (rng.standard_normal(array.shape) * 50).astype(dtype) for array in layout.arrays}
    written = data["a"]
    with Staging(root) as staging:
        index = make_index(keys, [0] * len(keys), ["x"] * len(keys), keys, [1] * len(keys))
        create_store(root, store, index, {}, staging.run_id)
        publish_all(root, layout, FeaturesIdentity(name="any"), data, keys, failed, staging)
    rows, views = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    for policy in ("never", "first", "always"):
        group = open_store(root).group("features/any", checksums=policy, n_threads=3)  # type: ignore[arg-type]
        assert group.failed_rows.tolist() == sorted(failed)
        for _ in range(2):  # under `first`, the second time is unchecked
            out = np.full((len(pairs), *shape), 7, dtype=dtype)
            group["a"].read_into(rows, views, out)
            np.testing.assert_array_equal(out, written[rows, views])
            beside = {name: np.full((len(pairs), *array.row_shape), 7, dtype) for name, array in group.arrays.items()}
            with patch("storage.gather.MIN_SHARE_BYTES", share_bytes):
                gather_into([(group[name], values) for name, values in beside.items()], rows, views)
            for name, values in beside.items():
                np.testing.assert_array_equal(values, data[name][rows, views])
    by_zarr = zarr.open_group(root, mode="r")["features/any/a"][:]
    np.testing.assert_array_equal(by_zarr[rows, views], out)
    assert not by_zarr[failed].any()  # an empty row reads as the fill value in any other program
    for row in failed:
        with pytest.raises(StoreError, match=rf"row {row}, view 0 is empty"):
            group["a"].read_into([row], 0, np.empty((1, *shape), dtype))
    group.close()


def _read_in_child(reader: object, rows: np.ndarray, pipe: object) -> None:
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)  # type: ignore[attr-defined]
    reader.read_into(rows, 0, out)  # type: ignore[attr-defined]
    pipe.send(out)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_works_in_a_child_process(shared_tiny_store: Path, method: str) -> None:
    reader = open_store(shared_tiny_store).group(LATENTS)["moments"]
    rows = np.array([3, 39, 0, 17])
    here = np.empty((4, *reader.row_shape), reader.dtype)
    reader.read_into(rows, 0, here)  # so that files and threads exist in the parent
    context = get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_read_in_child, args=(reader, rows, theirs))
    child.start()
    assert ours.poll(60)
    np.testing.assert_array_equal(ours.recv(), here)
    child.join()
    assert child.exitcode == 0


def test_a_pickled_reader_holds_no_file(shared_tiny_store: Path) -> None:
    reader = open_store(shared_tiny_store).group(LATENTS)["moments"]
    again = pickle.loads(pickle.dumps(reader))
    out, out_again = (np.empty((2, *reader.row_shape), reader.dtype) for _ in range(2))
    reader.read_into([5, 6], 0, out)
    again.read_into([5, 6], 0, out_again)
    np.testing.assert_array_equal(out, out_again)


def test_rows_views_and_buffers_outside_the_array_are_refused(shared_tiny_store: Path) -> None:
    reader = open_store(shared_tiny_store).group(LATENTS)["moments"]
    out = np.empty((1, *reader.row_shape), reader.dtype)
    for rows, views in (([40], 0), ([-1], 0), ([0], 1), ([0], -1)):
        with pytest.raises(IndexError):
            reader.read_into(rows, views, out)
    for wrong in (out.astype("f4"), out[:, :4], np.empty((2, *reader.row_shape), reader.dtype)):
        with pytest.raises(ValueError, match="out must be"):
            reader.read_into([0], 0, wrong)


@pytest.mark.parametrize("rows", [[0.5], 0, [[0, 1]], ["0"], [True]])
def test_rows_of_tokens_that_numpy_would_convert_are_refused(shared_tiny_store: Path, rows: Any) -> None:
    with closing(open_store(shared_tiny_store).group(FEATURES)) as group:
        with pytest.raises(ValueError, match=r"whole numbers|rows must be"):
            group.tokens(rows)
        for dtype in ("int8", "no such type"):
            with pytest.raises(UserError, match=f"floating-point numbers, got dtype '{dtype}'; ask for float16"):
                group.tokens([0], dtype=dtype)
        assert group.tokens([]).shape == (0, 64, 24)
        assert group.tokens(np.array([1, 0], dtype=np.uint8), dtype="float16").dtype == np.float16


def test_rows_that_numpy_would_convert_are_refused(shared_tiny_store: Path) -> None:
    reader = open_store(shared_tiny_store).group(LATENTS)["moments"]
    out = np.empty((2, *reader.row_shape), reader.dtype)
    wrong: list[tuple[object, object]] = [([1.7, 2.2], 0), (np.array([True, False]), 0), ([1, 2], 0.5), ([1, 2], [0])]
    for rows, views in [*wrong, ([[1], [2]], 0), ([1, 2], [[0], [0]])]:
        with pytest.raises(ValueError, match=r"whole numbers|rows must be"):
            reader.read_into(rows, views, out)  # type: ignore[arg-type]
    reader.read_into(np.array([1, 2], np.uint8), np.array([0, 0], np.int32), out)
    reader.read_into([], 0, out[:0])


def test_reading_ahead_advises_only_what_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", n_rows=64, shard_rows=16)
    patches = open_store(tmp_path / "s").group(FEATURES)["patches"]
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, advice: advised.append(start))
    rows = np.arange(0, 64, 2)
    monkeypatch.setattr(LocalFiles, "_is_cached", lambda self, unit, offset: unit < 3)
    patches.will_read(rows, 0)
    assert len(advised) == len(rows)
    monkeypatch.setattr(LocalFiles, "_is_cached", lambda self, unit, offset: True)
    patches.will_read(rows, 0)
    patches.will_read([], 0)
    assert len(advised) == len(rows)


@pytest.mark.parametrize("policy", ["first", "always"])
@pytest.mark.parametrize("damage", ["flip", "swap", "truncate"])
def test_damage_is_found_and_named(tmp_path: Path, policy: str, damage: str) -> None:
    root = tmp_path / "store"
    make_store(root, n_rows=48, shard_rows=16)
    shards = [root / FEATURES / "patches" / "c" / str(unit) / "0/0/0" for unit in range(3)]
    if damage == "flip":
        raw = bytearray(shards[1].read_bytes())
        raw[5 * (64 * 24 * 2 + 4) + 11] ^= 16  # row 5 of shard 1
        shards[1].write_bytes(raw)
    elif damage == "swap":
        first, second = shards[1].read_bytes(), shards[2].read_bytes()
        shards[1].write_bytes(second)
        shards[2].write_bytes(first)
    if damage == "truncate":
        shards[1].write_bytes(shards[1].read_bytes()[:-9])
        with pytest.raises(StoreError, match=r"not complete.*unit 1.*bytes"):
            open_store(root).group(FEATURES, checksums=policy)
        return
    patches = open_store(root).group(FEATURES, checksums=policy)["patches"]
    out = np.empty((16, *patches.row_shape), patches.dtype)
    patches.read_into(np.arange(16), 0, out)
    with pytest.raises(StoreError, match=r"patches/c/1/0/0/0, row (21|16), view 0: wrong checksum"):
        patches.read_into(np.arange(16, 32), 0, out)


@pytest.mark.parametrize("failed", [[], [18, 40]])  # regular shards, and some with an index of their own
@pytest.mark.parametrize("array", ["patches", "cls"])
def test_a_shard_cut_short_after_it_was_opened_names_the_row(tmp_path: Path, array: str, failed: list[int]) -> None:
    make_store(tmp_path, n_rows=48, shard_rows=16, failed_rows=failed)
    reader = open_store(tmp_path).group(FEATURES, checksums="never")[array]
    rows = np.array([1, 17, 21, 29, 45])
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read_into(rows, 0, out)
    before_row_29 = 29 - 16 - (18 in failed)
    shard = tmp_path / FEATURES / array / reader.opened.layout.shard_key(1)
    os.truncate(shard, before_row_29 * reader.opened.layout.stored_bytes + 3)
    with pytest.raises(StoreError, match=r"c/1/.*, row 29, view 0: the file is too short"):
        reader.read_into(rows, 0, out)


@pytest.mark.parametrize("policy", ["never", "first"])
def test_a_disk_that_fails_is_named_with_shard_and_row(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path)
    reader = open_store(tmp_path).group(LATENTS, checksums=policy)["moments"]  # type: ignore[arg-type]
    out = np.empty((2, *reader.row_shape), reader.dtype)
    preadv = os.preadv

    def failing(fd: int, buffers: object, offset: int, *flags: int) -> int:
        if offset == 5 * reader.opened.layout.stored_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, *flags)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StoreError, match=r"moments/c/1/0/0/0/0, row 21, view 0: Input/output error"):
        reader.read_into([3, 21], 0, out)


def test_a_short_read_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_store(tmp_path)[LATENTS]["moments"]
    reader = open_store(tmp_path).group(LATENTS, checksums="never")["moments"]
    preadv, n_short = os.preadv, [0]

    def short(fd: int, buffers: Any, offset: int) -> int:
        whole = memoryview(buffers[0]).cast("B")
        n_short[0] += len(whole) > 100
        return preadv(fd, [whole[:100]], offset)

    monkeypatch.setattr(os, "preadv", short)
    rows = np.random.default_rng(0).permutation(40)
    out = np.empty((40, *reader.row_shape), reader.dtype)
    reader.read_into(rows, 0, out)
    np.testing.assert_array_equal(out, data[rows, 0])
    assert n_short[0] >= 40


def test_the_last_chunk_is_checked_as_the_first_was_and_then_none(tmp_path: Path) -> None:
    make_store(tmp_path)
    reader = open_store(tmp_path).group(LATENTS, n_threads=3)["moments"]
    last, n_bytes = 21, reader.opened.layout.stored_bytes
    out = np.empty((1, *reader.row_shape), reader.dtype)
    for seed in range(3):
        for row in np.random.default_rng(seed).permutation(40):
            if row != last:
                reader.read_into([row, row], 0, np.repeat(out, 2, axis=0))
    assert reader.opened.checks.n_unseen == 1
    with open(tmp_path / LATENTS / "moments/c/1/0/0/0/0", "r+b") as file:
        file.seek((last - 16) * n_bytes + 5)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    for _ in range(2):
        with pytest.raises(StoreError, match="row 21, view 0: wrong checksum"):
            reader.read_into([last], 0, out)
    with open(tmp_path / LATENTS / "moments/c/1/0/0/0/0", "r+b") as file:
        file.seek((last - 16) * n_bytes + 5)
        file.write(bytes([byte]))
    reader.read_into([last], 0, out)
    assert reader.opened.checks.n_unseen == 0
    reader.close()
    assert reader.opened.checks.n_unseen == 40


def test_an_index_that_is_read_again_never_looks_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that looked at the state at that moment would take the shard for a regular one."""
    monkeypatch.setattr(storage.offsets, "INDEX_BYTES_KEPT", 1)
    data = make_store(tmp_path, failed_rows=[0, 17, 33])[LATENTS]["moments"]
    reader = open_store(tmp_path).group(LATENTS, checksums="never")["moments"]
    rows = np.array([row for row in range(40) if row not in (0, 17, 33)])
    tail, states = reader.opened.files.tail, []

    def looked_at(unit: int, n_bytes: int) -> tuple[int, bytes]:
        states.append(int(reader.opened.offsets._state[unit]))
        return tail(unit, n_bytes)

    def read(seed: int) -> None:
        for order in np.random.default_rng(seed).permuted(np.tile(rows, (20, 1)), axis=1):
            out = np.empty((len(order), *reader.row_shape), reader.dtype)
            reader.read_into(order, 0, out)
            np.testing.assert_array_equal(out, data[order, 0])

    read(0)
    monkeypatch.setattr(reader.opened.files, "tail", looked_at)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert set(states) == {IRREGULAR}
