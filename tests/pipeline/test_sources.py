"""Every source: the same images in any container are the same rows, whatever the order on disk."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.sources import open_source
from storage.base.errors import UserError
from tests.examples import examples
from tests.pipeline.containers import (
    WRITERS,
    Labelled,
    label_of,
    photographs,
    write_image_folder,
    write_parquet,
    write_tar_of_tars,
)
from tests.pipeline.reading import RESOLUTION, SAMPLES, check, decode_all


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_is_recognised_and_reads_back_what_was_written(containers: dict[str, str], name: str) -> None:
    data = containers[name]
    listing = check(data, SAMPLES)
    source = open_source(data)
    assert source.kind == WRITERS[name][0]
    assert source.listing() == listing
    again = open_source(source.provenance()["path"], source.provenance()["kind"])
    some = [5, 59, 0, 31, 31, 7]  # preview and other readers come in any order
    locations = [listing.index.locations[row] for row in some]
    assert list(again.read_many(locations)) == [SAMPLES[row].data for row in some]
    sizes = listing.index.table["nbytes"].to_pylist()
    if source.kind in ("parquet", "hdf5"):
        assert set(sizes) == {-1}
    elif name != "zip":  # deflated: what it takes in the file
        assert sizes == [len(sample.data) for sample in SAMPLES]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "image-folder"])
def test_decoded_arrays_do_not_depend_on_the_container(containers: dict[str, str], name: str) -> None:
    expected, found = (open_source(containers[each]) for each in ("image-folder", name))
    np.testing.assert_array_equal(decode_all(found, found.listing()), decode_all(expected, expected.listing()))


@pytest.mark.slow
def test_two_thousand_images_give_identical_arrays_in_every_container(tmp_path: Path) -> None:
    samples = photographs(20, 100, seed=1)
    expected = None
    for name, (_, write) in WRITERS.items():
        source = open_source(write(tmp_path / name, samples))
        listing = source.listing()
        assert len(listing.index) == 2000
        assert listing.index.labels.tolist() == [label_of(sample, samples) for sample in samples]
        decoded = decode_all(source, listing, unit_rows=512)
        expected = decoded if expected is None else expected
        np.testing.assert_array_equal(decoded, expected)


def test_imagenets_tars_have_the_index_of_the_unpacked_tree(containers: dict[str, str]) -> None:
    digests = {
        open_source(containers[n]).listing().index.digest() for n in ("image-folder", "tar-of-tars", "class-tars")
    }
    assert len(digests) == 1  # so a store made of one is gone on with from another


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.tuples(st.sampled_from(["a", "b-", "a0"]), st.from_regex(r"[a-zA-Z0-9é_-]{1,30}", fullmatch=True)),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    order=st.randoms(use_true_random=False),
)
def test_order_is_that_of_the_names_and_not_of_the_disk(
    tmp_path: Path, names: list[tuple[str, str]], order: random.Random
) -> None:
    samples = sorted(Labelled(folder, f"{name}.png", f"{folder}{name}".encode()) for folder, name in names)
    samples = [sample for sample in samples if not any(sample.name.startswith(c) for c in "._")]
    shuffled = list(samples)
    order.shuffle(shuffled)
    for write in (write_image_folder, write_tar_of_tars):
        root = tmp_path / "each"
        shutil.rmtree(root, ignore_errors=True)
        if samples:
            check(write(root, shuffled), samples)


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.dictionaries(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 10**6)),
        st.binary(min_size=1, max_size=3000),
        min_size=3,
    )
)
def test_whatever_the_bytes_are_they_come_back(tmp_path: Path, contents: dict[tuple[str, int], bytes]) -> None:
    samples = sorted(Labelled(folder, f"{folder}{number}.jpg", data) for (folder, number), data in contents.items())
    for kind, write in WRITERS.values():
        shutil.rmtree(tmp_path / "each", ignore_errors=True)
        check(write(tmp_path / "each", samples), samples, kind)


def test_a_unit_reads_each_row_group_once(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "p", SAMPLES, n_files=1, group_rows=7))
    locations = source.listing().index.locations[10:40]
    asked: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: object, **kwargs: object) -> object:
        asked.extend(kwargs["row_groups"])  # type: ignore[call-overload]
        return iter_batches(self, *args, **kwargs)

    with mock.patch.object(pq.ParquetFile, "iter_batches", counted):
        assert list(source.read_many(locations)) == [sample.data for sample in SAMPLES[10:40]]
    assert asked == [1, 2, 3, 4, 5]


def test_pixels_in_hdf5_need_no_decoding(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "pixels.hdf5", "w") as file:
        file.create_dataset("x", data=pixels, chunks=(3, RESOLUTION, RESOLUTION, 3), compression="gzip")
        file["label"] = [b"cat", b"dog"] * 10
    source = open_source(str(tmp_path / "pixels.hdf5"))
    listing = source.listing()
    assert listing.index.class_names == ["cat", "dog"]
    assert listing.index.labels.tolist() == [0, 1] * 10
    with mock.patch("pipeline.sources.hdf5.CALL_BYTES", 1):  # a chunk a call
        np.testing.assert_array_equal(decode_all(source, listing), pixels)


def test_what_no_picture_is_named_like_is_left_out(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "tree", SAMPLES)
    os.mkfifo(tmp_path / "tree/n00000001/pipe.jpg")
    (tmp_path / "tree/n00000001/.hidden.jpg").write_bytes(b"")
    (tmp_path / "tree/.cache").mkdir()
    (tmp_path / "tree/n00000002/deeper").mkdir()
    (tmp_path / "tree/n00000002/deeper/notes.txt").write_text("")
    (tmp_path / "tree/stray.jpg").write_bytes(b"")
    listing = open_source(data).listing()
    assert sorted(listing.left_out) == sorted(
        ["stray.jpg", "n00000002/deeper/notes.txt", ".cache", "n00000001/.hidden.jpg", "n00000001/pipe.jpg"]
    )
    assert len(listing.index) == len(SAMPLES)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/tree/n00000003/\xff.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match="name is not UTF-8"):
        open_source(data).listing()
