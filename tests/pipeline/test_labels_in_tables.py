"""Labels in labels.csv and dataset.json: no file outside, no path twice, no image that is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.sources import LabelOptions, open_source
from tests.pipeline.labelled import SECRET, refused

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
