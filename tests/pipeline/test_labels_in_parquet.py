"""Labels in Parquet's own types: every Arrow type that says the same is read the same, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import LabelOptions, open_source
from pipeline.sources.protocol import Unreadable
from storage.base.errors import UserError
from tests.pipeline.labelled import NAMES, NUMBERS, PICTURES, STRUCT, N, refused


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


BLANK = bytes(100 << 20)  # what no image shrinks to


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": pa.array([BLANK] * 3), "label": NUMBERS[:3]}, r"'image' declares 3\d\d,\d{3},\d{3} bytes in"),
        ({"image": PICTURES, "label": ["n" * (2 << 20)] * N}, r"'label' declares 2,\d{3},\d{3} bytes in"),
        ({"image": PICTURES, "label": ["n" * 5000] * N}, r"holds a name of 5,000 characters, .* may have 1,000"),
        ({"image": PICTURES, "label": ["n" * 1001] * N}, r"has 1,001 characters, a class name may have 1,000"),
    ],
    ids=["images", "names", "a long name", "a name"],
)
def test_what_a_file_inflates_to_is_bounded(tmp_path: Path, columns: dict[str, pa.Array], says: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd", use_dictionary=["label"])
    with pytest.raises(UserError, match=says):
        open_source(str(tmp_path / "a.parquet")).listing()


def test_an_image_beyond_the_bound_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_table(tmp_path / "a.parquet", {"image": PICTURES, "label": NUMBERS})))
    longest = max(PICTURES, key=len)
    monkeypatch.setattr("pipeline.sources.parquet.MAX_SAMPLE_BYTES", len(longest) - 1)
    for sample, picture in zip(source.read_many(source.listing().index.locations), PICTURES, strict=True):
        assert isinstance(sample, Unreadable) == (len(picture) == len(longest))
