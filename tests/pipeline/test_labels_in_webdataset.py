"""Labels in WebDataset's sidecars: members that stand apart, texts that hold none, columns by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.sources import LabelOptions, Listing, open_source
from storage.base.errors import UserError
from tests.pipeline.containers import tar_bytes


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
