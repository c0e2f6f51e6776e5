"""Labels in HDF5: numbers and names of any type, what is none of these, and no byte of another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.sources import LabelOptions, open_source
from pipeline.sources.protocol import too_large
from storage.base.errors import UserError
from storage.hdf5 import FEWEST_ROWS, MAX_CHUNK_BYTES, MOST_ROWS, rows_of_any_length
from tests.pipeline.labelled import NAMES, NUMBERS, SECRET, N, refused

PIXELS = np.arange(N * 4 * 5 * 3, dtype=np.uint8).reshape(N, 4, 5, 3)


def write_h5(path: Path, labels: Any, name: str = "labels", **more: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["images"] = PIXELS
        if labels is not None:
            file.create_dataset(name, data=labels, **more)
    return path


H5_NUMBERS: dict[str, Any] = {
    "(N, 1)": np.array(NUMBERS)[:, None],
    "(N, 1, 1)": np.array(NUMBERS)[:, None, None],
    "float16": np.array(NUMBERS, "f2"),
    "float64, big endian": np.array(NUMBERS, ">f8"),
    "uint64": np.array(NUMBERS, "u8"),
    "numerals": np.array([f"{n}" for n in NUMBERS], "S3"),
}


@pytest.mark.parametrize("labels", H5_NUMBERS)
def test_hdf5_numbers_of_any_type(tmp_path: Path, labels: str) -> None:
    listing = open_source(str(write_h5(tmp_path / "a.h5", H5_NUMBERS[labels]))).listing()
    assert listing.index.labels.tolist() == NUMBERS


@pytest.mark.parametrize("labels", [np.array(NAMES, "S5"), np.array(NAMES, object)])
def test_hdf5_names_of_any_length(tmp_path: Path, labels: Any) -> None:
    listing = open_source(str(write_h5(tmp_path / "a.h5", labels))).listing()
    assert listing.index.labels.tolist() == NUMBERS
    assert listing.index.class_names == NAMES[:3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3, dtype="f4")[NUMBERS], r"'/labels' has shape \(6, 3\), expected .* one-hot rows are not read"),
        (np.array(NUMBERS)[None], r"'/labels' has shape \(1, 6\)"),
        (np.int64(3), r"'/labels' has shape \(\)"),
        (np.array(NUMBERS[:5]), "'/labels' has 5 rows, expected 6"),
        (np.array([b"caf\xe9"] * N), r"'/labels', row 0: b'caf\\xe9' is not UTF-8"),
        (np.array([(1, 2)] * N, "i4,i4"), "holds .*not numbers or names"),
        (np.array([1j] * N), "holds complex128, not numbers or names"),
        (np.array([np.nan, 1, 2] * 2), "2 of 6 images have no label, first a/000000"),
        (np.array([0, 1.5, 2] * 2), "a/000001: label 1.5: a label is a whole number"),
        (np.array([0, -4, 2] * 2), "a/000001: label -4"),
        (np.array([2**64 - 1] * N, "u8"), "a/000000: label 18446744073709551615"),
        (h5py.Empty("i8"), "'/labels' is empty, without a shape"),
        (None, r"data set labels or label; the file holds images \(6, 4, 5, 3\) uint8"),
    ],
)
def test_hdf5_labels_that_are_none(tmp_path: Path, labels: Any, message: str) -> None:
    path = write_h5(tmp_path / "a.h5", labels)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(path)).listing()
    assert "\n" not in str(error.value)
    assert open_source(str(path)).listing(LabelOptions(unlabelled=True)).index.labels.tolist() == [-1] * N


def test_hdf5_labels_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["image"] = PIXELS
        file["labels/fine"] = NUMBERS
        file["labels/refs"] = np.array([file["image"].ref] * N, h5py.ref_dtype)
        file["soft"] = h5py.SoftLink("/labels/fine")
        file["loop"] = h5py.SoftLink("loop")
    refused(path, r"labels is a group, of fine \(6,\) int64, .*name the one .* by --label-column labels/NAME")
    for name in ("labels/fine", "/labels/fine", "soft"):
        assert open_source(str(path)).listing(LabelOptions(column=name)).index.labels.tolist() == NUMBERS
    refused(path, "'/labels/refs' holds references, not numbers or names", column="labels/refs")
    refused(path, "'loop' is a soft link that leads nowhere", column="loop")
    refused(path, "no data set 'labels/coarse' .*; the file holds image", column="labels/coarse")
    with h5py.File(path, "w") as file:
        file["image"] = PIXELS
        file["label"] = file["labels"] = NUMBERS
    refused(path, "has the data sets labels and label; name the one that holds labels by --label-column")
    with h5py.File(path, "a") as file:
        file["images"] = PIXELS + 1
    refused(path, "2 data sets of images", column="label")


def foreign_dataset(file: h5py.File, name: str, how: str, folder: Path) -> None:
    """A data set of the shape and type of images or labels whose bytes lie in another file."""
    kind, shape = ("u1", PIXELS.shape) if name == "images" else ("i8", (N,))
    if how == "raw storage":
        file.create_dataset(name, shape, kind, external=[(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)])
    elif how == "external link":
        file[name] = h5py.ExternalLink(str(folder / "other.h5"), name)
    elif how == "soft link to an external link":
        file[f"x_{name}"] = h5py.ExternalLink(str(folder / "other.h5"), "/")
        file[name] = h5py.SoftLink(f"/x_{name}/{name}")
    else:
        layout = h5py.VirtualLayout(shape, kind)
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), name, shape)
        file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("name", ["images", "labels"])
@pytest.mark.parametrize("how", ["raw storage", "external link", "soft link to an external link", "virtual"])
def test_hdf5_shows_no_byte_of_another_file(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / "secret").write_bytes(SECRET * 64)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"], file["labels"] = PIXELS, NUMBERS
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for each in ("images", "labels"):
            if each == name:
                foreign_dataset(file, each, how, tmp_path)
            else:
                file[each] = PIXELS if each == "images" else NUMBERS
    says = {"raw storage": "bytes in another file, .*secret", "virtual": "virtual data set"}.get(how, "external link")
    refused(path, rf"{name}' (is|has).*{says}|{says}")
    if name == "labels":
        assert len(open_source(str(path)).listing(LabelOptions(unlabelled=True)).index) == N
    else:
        refused(path, says, unlabelled=True)
        with pytest.raises(UserError, match=says):
            list(open_source(str(path)).read_many(["a.h5#0"]))


def test_what_hdf5_declares_and_never_wrote_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for shape, chunks, message in [
        ((N, 4, 5, 3), None, r"has 0 bytes, it was never written"),
        ((10**12, 4, 5, 3), (1, 4, 5, 3), "has 0 of 1,000,000,000,000 chunks"),
        ((N, 40_000, 40_000, 3), (1, 20_000, 20_000, 3), "has chunks of 1,200,000,000 bytes"),
    ]:
        with h5py.File(path, "w") as file:
            file.create_dataset("images", shape, "u1", chunks=chunks)
        refused(path, message, unlabelled=True)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (N, 4, 5, 3), "u1", chunks=(1, 4, 5, 3))
        images[:4] = PIXELS[:4]
    refused(path, "has 4 of 6 chunks, the rest was never written", unlabelled=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "images", data=np.zeros((2_000_000, 1, 1, 3), "u1"), chunks=(2_000_000, 1, 1, 3), compression=9
        )
    refused(path, r"has 2,000,000 rows in a file of [\d,]+ bytes", unlabelled=True)


def test_rows_of_any_length_take_no_memory_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, large = tmp_path / "a.h5", bytes(9000)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (N,), h5py.vlen_dtype(np.uint8))
        for row in range(N):
            images[row] = np.frombuffer(large if row == 1 else b"ab", np.uint8)
        file.create_dataset("label", data=["cat"] * (N - 1) + ["x" * 5000], dtype=h5py.string_dtype())
        file.create_dataset("labels", data=NUMBERS)
        file.create_dataset("classes", data=["dog"] * 3 + ["y" * 5000], dtype=h5py.string_dtype())
    refused(
        path, r"'/label', row 5 has 5,000 bytes, a name may have 4,000; shorten it, or name another", column="label"
    )
    refused(path, r"'/classes', row 3 has 5,000 bytes", column="labels")
    monkeypatch.setattr("pipeline.sources.hdf5.MAX_SAMPLE_BYTES", 8000)
    source = open_source(str(path))
    rows = list(source.read_many([f"a.h5#{row}" for row in range(N)]))
    assert rows[0] == b"ab"
    assert rows[1] == too_large(9000)
    for file_nbytes, n_rows in [
        (0, MOST_ROWS),
        (1 << 20, MOST_ROWS),
        (MAX_CHUNK_BYTES // 20, 20),
        (1 << 40, FEWEST_ROWS),
    ]:
        assert rows_of_any_length(file_nbytes) == n_rows


def test_channels_first_are_refused_with_the_fix(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = PIXELS.transpose(0, 3, 1, 2), NUMBERS
    refused(tmp_path / "a.h5", "store images with the channels last, as uint8")
