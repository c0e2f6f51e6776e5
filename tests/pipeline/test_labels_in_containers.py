"""Labels in each container's own types: read right, or refused in one line that names file, column and option."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources import LabelOptions, Listing, open_source
from storage.errors import UserError
from tests.pipeline.containers import tar_bytes

N = 6


def picture(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), row, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(row) for row in range(N)]
NUMBERS, NAMES = [0, 1, 2] * 2, ["cat", "dog", "fox"] * 2
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def refused(data: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_source(str(data)).listing(LabelOptions(**options))
    assert "\n" not in str(error.value)
    assert str(data.parent) in str(error.value)


# Parquet


def write_table(path: Path, columns: dict[str, pa.Array], names: list[str] | None = None) -> Path:
    table = pa.table(columns)
    if names is not None:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path)
    return path


LABEL_COLUMNS = {
    "large_string": pa.array(NAMES, pa.large_string()),
    "string_view": pa.array(NAMES, pa.string_view()),
    "dictionary": pa.array(NAMES).dictionary_encode(),
    "dictionary of large_string": pa.array(NAMES, pa.large_string()).dictionary_encode(),
    "binary": pa.array([name.encode() for name in NAMES], pa.binary()),
    "int8": pa.array(NUMBERS, pa.int8()),
    "uint64": pa.array(NUMBERS, pa.uint64()),
    "float": pa.array([float(n) for n in NUMBERS], pa.float32()),
    "decimal": pa.array(NUMBERS, pa.decimal128(6, 0)),
    "dictionary of int": pa.array(NUMBERS).dictionary_encode(),
    "numerals": pa.array([f" {n}.0" for n in NUMBERS]),
}
IMAGE_COLUMNS = {
    "binary": pa.array(PICTURES, pa.binary()),
    "large_binary": pa.array(PICTURES, pa.large_binary()),
    "binary_view": pa.array(PICTURES, pa.binary_view()),
    "dictionary": pa.array(PICTURES, pa.binary()).dictionary_encode(),
    "struct": pa.array([{"bytes": p, "path": "/etc/passwd"} for p in PICTURES], STRUCT),
    "polars struct": pa.array(
        [{"path": None, "bytes": p} for p in PICTURES],
        pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
    ),
    "view struct": pa.array(
        [{"path": "", "bytes": p, "size": 1} for p in PICTURES],
        pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view()), ("size", pa.int64())]),
    ),
}


@pytest.mark.parametrize("label", LABEL_COLUMNS)
@pytest.mark.parametrize("image", IMAGE_COLUMNS)
def test_every_arrow_type_that_says_the_same_is_read_the_same(tmp_path: Path, image: str, label: str) -> None:
    columns = {"image.x": pa.array([b"another"] * N), "label": LABEL_COLUMNS[label], "image": IMAGE_COLUMNS[image]}
    source = open_source(str(write_table(tmp_path / "a.parquet", columns)))
    listing = source.listing()
    assert listing.index.labels.tolist() == NUMBERS
    words = "string" in label or label in ("dictionary", "binary")
    assert listing.index.class_names == (NAMES[:3] if words else ["0", "1", "2"])
    assert list(source.read_many(listing.index.locations)) == PICTURES


def test_booleans_are_two_classes(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"image": pa.array(PICTURES), "label": pa.array([True, False] * 3)})
    assert open_source(str(path)).listing().index.labels.tolist() == [1, 0] * 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"labels": pa.array(NUMBERS)},
            "no image has a label: .*column 'label'; the file has the columns image, labels",
        ),
        ({"label": pa.array([[n] for n in NUMBERS])}, "must hold numbers or names, it holds list<.*--label-column"),
        ({"label": pa.array([{"a": n} for n in NUMBERS])}, "must hold numbers or names, it holds struct<a: int64>"),
        ({"label": pa.array([0] * N, pa.timestamp("s"))}, "must hold numbers or names, it holds timestamp"),
        ({"label": pa.nulls(N)}, "no image has a label"),
        ({"label": pa.array([0, 1, None] * 2)}, "2 of 6 images have no label, first a/000002"),
        ({"label": pa.array(["0", "1", "x"] * 2)}, "a/000002"),
        ({"label": pa.array([b"\xff"] * N)}, "a/000000: .*is not UTF-8"),
        ({"label": pa.array([0.5] * N)}, "a/000000: label 0.5: a label is a whole number"),
        ({"label": pa.array([2**63] * N, pa.uint64())}, "a/000000: label 9223372036854775808: a label is"),
    ],
)
def test_parquet_labels_that_are_none(tmp_path: Path, columns: dict[str, pa.Array], message: str) -> None:
    path = write_table(tmp_path / "a.parquet", {"image": pa.array(PICTURES), **columns})
    with pytest.raises(UserError, match=message) as error:
        open_source(str(path)).listing()
    assert "\n" not in str(error.value)
    listing = open_source(str(path)).listing(LabelOptions(unlabelled=True))
    assert listing.index.labels.tolist() == [-1] * N


def test_parquet_columns_by_name(tmp_path: Path) -> None:
    columns = {"image": pa.array(PICTURES), "labels": pa.array(NUMBERS), "fine\x1b[31m": pa.array(NAMES)}
    path = write_table(tmp_path / "a.parquet", columns)
    assert open_source(str(path)).listing(LabelOptions(column="labels")).index.labels.tolist() == NUMBERS
    refused(path, r"has no column 'coarse' \(--label-column\); it has image, labels, fine\\x1b", column="coarse")
    twice = pa.Table.from_arrays([pa.array(PICTURES), *[pa.array(NUMBERS)] * 2], ["image", "label", "label"])
    pq.write_table(twice, path)
    refused(path, "has 2 column 'label'")
    write_table(path, {"img": pa.array(PICTURES), "label": pa.array(NUMBERS)})
    refused(path, "has no column 'image'; it has img, label; rename")
    write_table(path, {"image": pa.array(["/etc/passwd"] * N), "label": pa.array(NUMBERS)})
    refused(path, "must hold encoded images as binary, it holds string")
    paths = pa.array([{"bytes": None, "path": "/etc/passwd"}] * N, STRUCT)
    write_table(path, {"image": paths, "label": pa.array(NUMBERS)})
    refused(path, "no row of the column 'image' has bytes; paths to files elsewhere are not followed")


def test_names_beside_a_list_of_other_class_names(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"image": pa.array(PICTURES), "label": pa.array(NAMES)}, ["x", "y"])
    with pytest.raises(UserError, match="labels are 3 names, such as 'cat', and the list of class names has 2 others"):
        open_source(str(path)).listing()
    write_table(path, {"image": pa.array(PICTURES), "label": pa.array(NAMES)}, ["fox", "dog", "cat"])
    assert open_source(str(path)).listing().index.labels.tolist() == [2, 1, 0] * 2


# HDF5

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


SECRET = b"the user's own secret, sixty-four bytes of it and not one more.."


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


# Tables

OUTSIDE = [
    "../secret.png",
    "/etc/passwd",
    "sub/../../secret.png",
    "..",
    "\\\\host\\x.png",
    "..\\secret.png",
    "C:\\x.png",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("table", ["labels.csv", "dataset.json"])
def test_a_table_names_no_file_outside(tmp_path: Path, table: str, path: str) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(SECRET)
    (data / "a.png").write_bytes(b"a")
    pairs = [["a.png", 0], [path, 1]]
    text = json.dumps({"labels": pairs}) if table == "dataset.json" else f'file,label\na.png,0\n"{path}",1\n'
    (data / table).write_text(text)
    refused(data, r"leads out of the folder; paths are relative to it and without \.\.")
    refused(data, "leads out of the folder", unlabelled=True)


def test_a_table_names_no_folder_and_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("a.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"a")
    for name in ("sub", "pipe.png"):
        (tmp_path / "labels.csv").write_text(f"file,label\na.png,0\n{name},1\n")
        refused(tmp_path, f"'{name}' is named as an image and is no file")
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\n.hidden.png,1\n")
    listing = open_source(str(tmp_path)).listing()
    assert (len(listing.index), listing.warnings) == (2, ())


def test_what_a_table_names_twice_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")  # the user's own
    for table, text, message in [
        ("labels.csv", "file,label\n./a.png,0\na.png,1\n", "line 3: a.png comes a second time"),
        ("labels.csv", "file,label\na//b.png,0\n", "none of the 1 images .* is there, such as a/b.png"),
        ("labels.csv", 'file,label\n"a.png,0\nb.png,1\n', "a quoted field may not be closed"),
        ("labels.csv", "file,label\na,b.png,1\n", "line 2: 3 fields where the header has 2; quote"),
        ("labels.csv", "file,label,label\na.png,1,2\n", "two columns of one name"),
        ("labels.csv", 'file,label\n"a\0.png",1\n', r"line 2: 'a\\x00.png' is no path"),
        ("labels.csv", "\ufffefile".encode("utf-16").decode("latin-1"), "begin with a header|not UTF-8"),
        ("dataset.json", '{"labels": [["a.png", 0], ["a.png", 1]]}', "a.png comes a second time"),
        ("dataset.json", '{"labels": [["a.png", 0], ["./a.png", 1]]}', "names an image twice"),
        ("dataset.json", '{"labels": [["a.png", [0]]]}', "is damaged"),
        ("dataset.json", '{"labels": [["a.png", 0.5]]}', "dataset.json, a.png: label 0.5: a label is a whole number"),
        ("dataset.json", '{"fine": [["a.png", 0]]}', "no key 'labels', it has fine"),
        ("dataset.json", "[" * 100_000, "is damaged"),
        ("dataset.json", '{"labels": [["a.png", ' + "9" * 5000 + "]]}", "is damaged|whole number"),
    ]:
        for old in ("labels.csv", "dataset.json"):
            (tmp_path / old).unlink(missing_ok=True)
        (tmp_path / table).write_text(text)
        refused(tmp_path, message)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "labels.csv").write_bytes(
        '\ufefffile, label , class_name\r\n"a.png", 1.0, dog\r\nb.png,"0",cat\r\n\r\n  \r\n,,\r\n'.encode()
    )
    listing = open_source(str(tmp_path)).listing()
    assert listing.index.labels.tolist() == [1, 0]
    assert listing.index.class_names == ["cat", "dog"]
    assert listing.left_out == listing.warnings == ()
    (tmp_path / "labels.csv").write_bytes(b"file,label\ra.png,1\rb.png,x\r")
    refused(tmp_path, "labels.csv, line 3: label 'x' is a name|labels.csv, line 2: label 1 is a number")
    (tmp_path / "labels.csv").write_text("file,fine,label\na.png,3,\nb.png,4,\n")
    refused(tmp_path, "labels.csv, column 'label', is empty throughout; name what holds the labels with --label-column")
    assert open_source(str(tmp_path)).listing(LabelOptions(column="fine")).index.labels.tolist() == [3, 4]


# WebDataset


def shard(tmp_path: Path, members: list[tuple[str, bytes]]) -> Path:
    (tmp_path / "w.tar").write_bytes(tar_bytes(members))
    return tmp_path / "w.tar"


def labels_in(path: Path, listing: Listing | None = None, **options: Any) -> list[int]:
    listing = open_source(str(path)).listing(LabelOptions(**options))
    numbers: list[int] = listing.index.labels.tolist()
    return numbers


def test_webdataset_members_that_stand_apart(tmp_path: Path) -> None:
    images = [(f"{row}.png", b"x") for row in range(3)]
    numbers = [(f"{row}.cls", str(row).encode()) for row in range(3)]
    says = "0.cls in w.tar is not adjacent to its image 0.png"
    for members in (images + numbers, numbers + images, [images[0], images[1], numbers[0], numbers[1]]):
        path = shard(tmp_path, members)
        with pytest.raises(UserError, match=says):
            labels_in(path)
        assert labels_in(path, unlabelled=True) == [-1] * len([name for name, _ in members if name.endswith("png")])
    twice = [images[0], numbers[0], images[1], numbers[1], images[0], numbers[0]]  # shards put together
    assert labels_in(shard(tmp_path, twice)) == [0, 1, 0]


@pytest.mark.parametrize(
    ("sidecars", "message"),
    [
        ({"json": b'{"caption": "x"}'}, "looked through for .cls, .json .*; beside the first image, 0, stands .json"),
        ({"json": b'{"label": [1]}'}, r"label that cannot be read, 0.json \(label \[1\] is not one number or name\)"),
        ({"json": b'{"label": {"a": 1}}'}, "is not one number or name"),
        ({"json": b'{"label": 1}', "cls": b"2"}, r"0.cls \(label 2, and 1 in its .json\)"),
        ({"json": b"[" * 100_000}, "label that cannot be read, 0.json"),
        ({"json": b'{"label": 0.5}'}, "w/0: label 0.5: a label is a whole number"),
        ({"cls": b"\xff"}, "label that cannot be read, 0.cls"),
        ({"cls": b""}, "no image has a label"),
        ({"cls": b"x" * (5 << 20)}, "has 5,242,880 bytes, too many for a label"),
        ({"txt": b"a caption"}, "no image has a label"),
        ({"cls": b"-7"}, "w/0: label -7"),
    ],
)
def test_webdataset_sidecars_that_hold_no_label(tmp_path: Path, sidecars: dict[str, bytes], message: str) -> None:
    path = shard(tmp_path, [("0.png", b"x"), *((f"0.{suffix}", raw) for suffix, raw in sidecars.items())])
    with pytest.raises(UserError, match=message) as error:
        labels_in(path)
    assert "\n" not in str(error.value)
    assert labels_in(path, unlabelled=True) == [-1]


def test_webdataset_labels_by_name(tmp_path: Path) -> None:
    members = [("0.png", b"x"), ("0.json", b'{"fine": "3.0", "label": 1}'), ("0.target", b"7"), ("0.txt", b"9")]
    path = shard(tmp_path, members)
    for column, label in {"fine": 3, "": 1, ".target": 7, ".txt": 9}.items():
        assert labels_in(path, column=column) == [label]
    with pytest.raises(UserError, match="looked through for --label-column coarse"):
        labels_in(path, column="coarse")
    two = [("0.png", b"x"), ("0.json", b'{"label": 1, "class_name": "cat"}')]
    path = shard(tmp_path, [*two, ("1.png", b"x"), ("1.json", b'{"label": "1", "class_name": "dog"}')])
    with pytest.raises(UserError, match="label 1 has two names, cat and dog"):
        labels_in(path)
