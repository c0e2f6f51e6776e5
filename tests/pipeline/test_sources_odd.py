"""What is odd, damaged or gone in a source: read right, or said, never skipped in silence."""

from __future__ import annotations

import contextlib
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.decode import decode_unit
from pipeline.sources import KINDS, LabelOptions, Unreadable, open_source
from storage.base.errors import UserError
from tests.pipeline.containers import (
    WRITERS,
    Labelled,
    add_to_tar,
    class_tar,
    classes,
    parquet_table,
    tar_bytes,
    write_image_folder,
    write_parquet,
    write_tar_of_tars,
    write_webdataset,
)
from tests.pipeline.reading import RESOLUTION, SAMPLES, check, read_all


def test_a_file_that_is_gone_fails_alone_and_a_folder_that_is_gone_fails_the_unit(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "tree", SAMPLES)
    (tmp_path / "tree/n00000000/dangling.png").symlink_to(tmp_path / "nowhere")
    source = open_source(data)
    index = source.listing().index
    (tmp_path / "tree" / index.keys[4]).unlink()
    images, (failures, *_) = decode_unit(source, 100, index.keys[:20], index.locations[:20], RESOLUTION)
    reason = "cannot be read: No such file or directory"
    assert [(f.row, f.key, f.reason) for f in failures] == [
        (100, "n00000000/dangling.png", reason),
        (104, index.keys[4], reason),
    ]
    assert not images[4].any()
    shutil.rmtree(data)
    with pytest.raises(FileNotFoundError):
        decode_unit(source, 0, index.keys[:1], index.locations[:1], RESOLUTION)


@pytest.mark.parametrize("name", ["tar-of-tars", "class-tars", "parquet", "webdataset", "hdf5", "zip"])
def test_a_container_that_is_gone_or_cut_fails_the_unit(tmp_path: Path, name: str) -> None:
    source = open_source(WRITERS[name][1](tmp_path / "c", SAMPLES))
    index = source.listing().index
    containers = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    for path in containers:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((OSError, pa.ArrowException)):
        list(source.read_many(index.locations))
    for path in containers:
        path.unlink()
    with pytest.raises(OSError, match="No such file"):
        list(source.read_many(index.locations))


@pytest.mark.parametrize("name", ["tar-of-tars", "class-tars", "parquet", "webdataset", "hdf5", "zip"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_container_is_said_before_anything_is_encoded(tmp_path: Path, name: str, damage: str) -> None:
    data = WRITERS[name][1](tmp_path / "c", SAMPLES)
    path = sorted(path for path in (tmp_path / "c").rglob("*") if path.is_file())[-1]
    raw = path.read_bytes()
    noise = np.random.default_rng(0).bytes(3000)
    path.write_bytes({"cut": raw[: len(raw) // 2 + 100], "empty": b"", "noise": noise}[damage])
    with pytest.raises(UserError) as error:
        open_source(data, WRITERS[name][0]).listing()
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_damaged_header_in_a_tar_does_not_end_it_silently(tmp_path: Path) -> None:
    data = Path(write_tar_of_tars(tmp_path / "t", SAMPLES))
    raw = bytearray(data.read_bytes())
    header = raw.index(SAMPLES[20].name.encode())
    raw[header + 5] ^= 1
    data.write_bytes(raw)
    with pytest.raises(UserError, match=r"the tar at byte \d+\) is no whole.*no header at byte"):
        open_source(str(data)).listing()


def test_a_damaged_member_of_a_zip_fails_alone(tmp_path: Path) -> None:
    data = Path(WRITERS["edm-zip"][1](tmp_path / "z", SAMPLES))
    raw = bytearray(data.read_bytes())
    raw[raw.index(SAMPLES[3].data) + 40] ^= 1
    data.write_bytes(raw)
    source = open_source(str(data))
    read = read_all(source, source.listing())
    assert read[3] == Unreadable("damaged in its zip: wrong CRC-32")
    assert read[4] == SAMPLES[4].data


def test_long_names_links_and_folders_in_tars(tmp_path: Path) -> None:
    import tarfile

    long = "x" * 180 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add_to_tar(archive, long, b"one")
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add_to_tar(archive, "sub/é.png", b"two")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, long
        archive.addfile(link)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add_to_tar(archive, "y" * 300 + ".png", b"three")
        add_to_tar(archive, "same.png", b"four")
        add_to_tar(archive, "same.png", b"five")
    (tmp_path / "c.tar").write_bytes(tar_bytes([]))
    source = open_source(str(tmp_path), "class-tars")
    listing = source.listing()
    assert listing.left_out == ()  # a link to a member is a sample
    assert listing.index.keys[:3] == ["a/link.png", "a/sub/é.png", f"a/{long}"]
    assert "b/same.png#2" in listing.index.keys
    assert sorted(read_all(source, listing)) == sorted([b"one", b"one", b"two", b"three", b"four", b"five"])
    assert [re.sub(r"y+", "y", warning) for warning in listing.warnings] == [
        "1 of 3 classes have no image, such as c",
        "1 keys come more than once, such as b/same.png; numbered #2, #3, …",
    ]


def test_webdataset_labels_from_every_sidecar(tmp_path: Path) -> None:
    members = [
        ("a.b.jpg", b"A"),  # WebDataset's suffix begins at the first dot: "b.jpg" is no picture's
        ("s/one.jpg", b"1"),
        ("s/one.cls", b"7\n"),
        ("s/one.txt", b"a caption"),
        ("two.png", b"2"),
        ("two.json", b'{"label": 3, "class_name": "tench"}'),
        ("three.webp", b"3"),
        ("three.txt", b" 4 "),
        ("four.jpg", b"4"),
        ("four.txt", b"a caption, not a label"),
        ("four.png", b"a second picture of the same sample"),
        ("five.cls", b"1"),
    ]
    (tmp_path / "w.tar").write_bytes(tar_bytes(members))
    source = open_source(str(tmp_path / "w.tar"))
    with pytest.raises(UserError, match=r"1 of 4 images have no label, first w/four; .*--partly-labelled"):
        source.listing()
    listing = source.listing(LabelOptions(partly_labelled=True))
    assert listing.index.keys == ["w/s/one", "w/two", "w/three", "w/four"]
    assert listing.index.labels.tolist() == [7, 3, 4, -1]
    assert listing.index.table["class_name"].to_pylist() == ["7", "tench", "4", ""]
    assert listing.left_out == ("w.tar/a.b.jpg", "w.tar/four.png", "w.tar/five.cls")
    assert read_all(source, listing) == [b"1", b"2", b"3", b"4"]
    assert "1 of 4 images have no label (−1), first w/four" in listing.warnings
    (tmp_path / "w.tar").write_bytes(tar_bytes([("a.jpg", b"A"), ("a.json", b"{")]))
    with pytest.raises(UserError, match=r"a label that cannot be read, a\.json"):
        open_source(str(tmp_path / "w.tar")).listing()
    for label, message in [("\ufeff3".encode(), ""), ("3é".encode("utf-16"), r"a\.cls \(it is not UTF-8; save labels")]:
        (tmp_path / "w.tar").write_bytes(tar_bytes([("a.jpg", b"A"), ("a.cls", label)]))
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            assert open_source(str(tmp_path / "w.tar")).listing().index.labels.tolist() == [3]


def test_parquet_null_images_plain_bytes_and_absent_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x", None, b"z"], pa.binary())}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    listing = source.listing(LabelOptions(unlabelled=True))
    assert listing.index.labels.tolist() == [-1, -1, -1]
    assert read_all(source, listing) == [b"x", Unreadable("the image column is null"), b"z"]
    pq.write_table(pa.table({"pixels": [1], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'image'; it has pixels, label"):
        open_source(str(tmp_path / "a.parquet")).listing()


def test_files_that_number_their_classes_differently_are_not_mixed(tmp_path: Path) -> None:
    for name, names in (("a", classes(SAMPLES)), ("b", classes(SAMPLES)[::-1])):
        pq.write_table(parquet_table(SAMPLES, names), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="name their classes differently"):
        open_source(str(tmp_path)).listing()


def test_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        pq.write_table(parquet_table(SAMPLES, classes(SAMPLES)), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"several splits \(train, validation\); name one by a pattern"):
        open_source(str(tmp_path)).listing()
    check(f"{tmp_path}/train-*.parquet", SAMPLES)


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_image_folder(tmp_path / "tree" / name, SAMPLES)
    with pytest.raises(UserError, match=r"holds splits \(train, val\) and not class folders; name one of them"):
        open_source(str(tmp_path / "tree")).listing()
    check(str(tmp_path / "tree/train"), SAMPLES)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("train/cat/1.png", "val/cat/1.png"):
            archive.writestr(name, b"")
    with pytest.raises(UserError, match=r"holds splits \(train, val\)"):
        open_source(str(tmp_path / "z.zip")).listing()
    vehicles = sorted(Labelled(name, f"{name}.png", name.encode()) for name in ("train", "test"))
    check(write_image_folder(tmp_path / "vehicles", vehicles), vehicles)  # classes by that name


def test_a_zip_of_one_class_keeps_its_class(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("cat/1.png", b"1")
        archive.writestr("cat/2.png", b"2")
        archive.writestr("readme.txt", b"")
        archive.writestr("stray.png", b"3")
    listing = open_source(str(tmp_path / "z.zip")).listing()
    assert listing.index.class_names == ["cat"]
    assert listing.left_out == ("readme.txt", "stray.png")


def test_labels_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "unlabelled.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "labels.csv").write_text("label,file,class_name\n1,sub/a.png,dog\n0,b.png,cat\n1,gone.png,dog\n")
    source = open_source(str(tmp_path))
    listing = source.listing()
    assert listing.index.keys == ["b.png", "gone.png", "sub/a.png"]
    assert listing.index.labels.tolist() == [0, 1, 1]
    assert listing.index.class_names == ["cat", "dog"]
    assert listing.left_out == ("unlabelled.png",)
    assert listing.warnings == ("1 images of labels.csv are not there, such as gone.png",)
    assert read_all(source, listing)[1] == Unreadable("cannot be read: No such file or directory")
    (tmp_path / "labels.csv").rename(tmp_path / "dataset.json")
    (tmp_path / "dataset.json").write_text('{"labels": [["sub/a.png", 5], ["b.png", null]]}')
    listing = open_source(str(tmp_path)).listing(LabelOptions(partly_labelled=True))
    assert listing.index.labels.tolist() == [-1, 5]
    for content, message in [
        ("file;label\na;1\n", "must begin with a header line"),
        ("file,label\na.png,1\na.png,2\n", "line 3: a.png comes a second time"),
        ("file,label,class_name\na.png,dog,dog\n", "class_name names numbers"),
        ("file,label\n", "names no image"),
        ("file,label\n,3\n", "line 2: no file"),
        ("file,label\né.png,3\n", "is not UTF-8"),
        ("file,label\nb.png,-3\n", "line 2: label -3: a label is a whole number from 0 to"),
    ]:
        (tmp_path / "dataset.json").unlink(missing_ok=True)
        (tmp_path / "labels.csv").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path)).listing()


def make_mistake(root: Path, name: str) -> str:
    root.mkdir()
    if name == "images only":
        for sample in SAMPLES[:3]:
            (root / sample.name).write_bytes(sample.data)
    elif name == "two kinds":
        (root / "a.parquet").write_bytes(b"")
        (root / "b.h5").write_bytes(b"")
    elif name == "hub clone":
        write_parquet(root / "data", SAMPLES)
    elif name == "compressed":
        (root / "a.tar.gz").write_bytes(b"")
    elif name == "images in one tar":
        (root / "val.tar").write_bytes(class_tar("n00000000", SAMPLES))
    elif name == "pattern":
        return f"{root}/*.parquet"
    elif name == "absent":
        return f"{root}/nowhere"
    elif name == "unknown protocol":
        return "gopher://host/images"
    return str(root)


MISTAKES = [
    ("empty", "holds nothing, expected one of these: image-folder: a folder with"),
    ("images only", "holds 2 × .png, 1 × .jpeg and nothing that labels them; .* or pass --unlabelled"),
    ("two kinds", r"holds 1 × .parquet, 1 × .h5: is it parquet or hdf5\? Say which with --source"),
    ("hub clone", r"1 class folders and no image in them .*; there is data/train-00000-of-00002.parquet"),
    ("compressed", r"holds 1 × .gz, expected"),
    ("images in one tar", r"holds 1 × .tar \(val.tar begins with n00000000_9.JPEG"),
    ("pattern", "no file matches the pattern"),
    ("absent", "does not exist; name a folder, a file, a pattern or a URL"),
    ("unknown protocol", "cannot be opened: Protocol not known: gopher"),
]


@pytest.mark.parametrize(("name", "message"), MISTAKES)
def test_mistakes_say_what_was_found_and_what_is_expected(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_source(make_mistake(tmp_path / "x", name)).listing()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_kind_that_is_named_and_not_there_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path), kind).listing()
    assert "\n" not in str(error.value)


def test_source_overrides_what_is_there(tmp_path: Path) -> None:
    data = write_webdataset(tmp_path / "w", SAMPLES)
    for path in (tmp_path / "w").glob("*.tar"):
        path.rename(path.with_suffix(".parquet.tar"))
    (tmp_path / "w/extra.h5").write_bytes(b"")
    check_kind = open_source(data, "webdataset").listing()
    assert check_kind.left_out == ("extra.h5",)
    assert len(check_kind.index) == len(SAMPLES)
    with pytest.raises(UserError, match="--source must be one of auto, image-folder, "):
        open_source(data, "lmdb")
