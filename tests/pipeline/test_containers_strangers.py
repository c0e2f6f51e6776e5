"""Containers that somebody else made: cut, joined, renamed, linked, or edited in their headers' fields."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.sources import LabelOptions, Unreadable, open_source
from pipeline.sources.data_entries import DataEntries
from pipeline.sources.files import Entries, File, RemoteFiles
from pipeline.sources.leftovers import leftover
from storage.base.errors import UserError
from tests.examples import examples

BASE = [("cat/0.png", b"c0"), ("cat/1.png", b"c1"), ("dog/0.png", b"d0")]


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, members: Sequence[tuple[str | zipfile.ZipInfo, bytes]]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return str(path)


def rows(data: str | Path, kind: str = "auto") -> list[tuple[str, int, bytes]]:
    source = open_source(str(data), kind)
    listing = source.listing()
    samples = list(source.read_many(listing.index.locations))
    return list(zip(listing.index.keys, listing.index.labels.tolist(), samples, strict=True))


def test_a_tar_that_is_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    tar(tmp_path / "t/dog.tar", [("0.png", b"d")])
    raw = tar(tmp_path / "t/cat.tar", [(f"{i}.png", b"x" * 600) for i in range(3)]).read_bytes()
    whole = rows(tmp_path / "t")
    for nbytes in range(0, len(raw), 256):
        (tmp_path / "t/cat.tar").write_bytes(raw[:nbytes])
        message = ""
        try:
            assert rows(tmp_path / "t") == whole
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert not message or nbytes <= 3 * 1536


def test_joined_tars_are_refused_and_what_pads_a_tar_is_not(tmp_path: Path) -> None:
    first, second = (tar(tmp_path / f"t/{name}.tar", [(f"{name}.png", b"x")]) for name in "ab")
    whole = rows(tmp_path / "t")
    raw = first.read_bytes()
    first.write_bytes(raw + bytes(100_000) + b"signed by nobody")
    assert rows(tmp_path / "t") == whole
    first.write_bytes(raw + second.read_bytes())
    with pytest.raises(UserError, match=r"a.tar goes on after its end, at byte 10240: tars that were joined"):
        rows(tmp_path / "t")


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ({"part1": BASE, "part2": BASE}, r"the same folders are in several tars \(cat, dog\)"),
        ({"in-train-0000": [("0.png", b"")], "in-train-0001": [("1.png", b"")]}, r"numbered as shards"),
        ({"00000": [("0.png", b"")], "00001": [("1.png", b"")]}, r"numbered as shards"),
    ],
)
def test_tars_that_are_parts_are_no_classes_unless_named(
    tmp_path: Path, tars: dict[str, list[tuple[str, bytes]]], message: str
) -> None:
    for name, members in tars.items():
        tar(tmp_path / "t" / f"{name}.tar", members)
    with pytest.raises(UserError, match=message + r".*--source class-tars"):
        rows(tmp_path / "t")
    assert {label for _, label, _ in rows(tmp_path / "t", "class-tars")} == {0, 1}
    listing = open_source(str(tmp_path / "t")).listing(LabelOptions(unlabelled=True))
    assert set(listing.index.labels.tolist()) == {-1}


def test_two_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    inner = tar(tmp_path / "cat.tar", [("0.png", b"x")]).read_bytes()
    tar(tmp_path / "o/outer.tar", [("a/cat.tar", inner), ("b/cat.tar", inner)])
    with pytest.raises(UserError, match=r"two tars called cat\.tar"):
        rows(tmp_path / "o/outer.tar")


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def test_links_in_a_zip_are_rows_as_in_a_folder(tmp_path: Path) -> None:
    links = [
        ("cat/2.png", b"../dog/0.png"),
        ("cat/3.png", b"2.png"),
        ("cat/4.png", b"/etc/passwd"),
        ("a.png", b"a.png"),
    ]
    data = zipped(tmp_path / "z.zip", [*BASE, *((link(name), target) for name, target in links)])
    assert rows(data) == [
        ("cat/0.png", 0, b"c0"),
        ("cat/1.png", 0, b"c1"),
        ("cat/2.png", 0, b"d0"),
        ("cat/3.png", 0, b"d0"),
        ("dog/0.png", 1, b"d0"),
    ]
    assert sorted(open_source(data).listing().left_out) == ["a.png", "cat/4.png"]


@pytest.mark.parametrize("above", ["", "pets/"])
def test_links_to_folders_in_containers_are_said(tmp_path: Path, above: str) -> None:
    members = [(above + name, data) for name, data in BASE]
    linked = (link(f"{above}cow"), b"cat/")
    listing = open_source(zipped(tmp_path / "z.zip", [*members, linked, (link("x"), b"nowhere")])).listing()
    says = "1 links to folders are not followed in a container ({}); unpack it to have the images there a second time"
    assert says.format(f"{above}cow") in listing.warnings
    assert listing.index.keys == [name for name, _ in members]
    for name in ("a", "b"):
        with tarfile.open(tar(tmp_path / f"t/{name}.tar", members), "a") as archive:
            info = tarfile.TarInfo(f"{above}cow")
            info.type, info.linkname = tarfile.SYMTYPE, "cat"
            archive.addfile(info)
    listing = open_source(str(tmp_path / "t"), "class-tars").listing()
    assert any("2 links to folders are not followed" in warning for warning in listing.warnings)
    assert len(listing.index) == 2 * len(BASE)


@pytest.mark.parametrize("above", ["", "pets/"])
def test_folders_without_images_beside_the_classes_of_a_zip_are_said(tmp_path: Path, above: str) -> None:
    members = [*((above + name, data) for name, data in BASE), (f"{above}cow/", b""), (f"{above}cat/deep/", b"")]
    listing = open_source(zipped(tmp_path / "z.zip", [*members, (f"{above}doc/readme.txt", b"")])).listing()
    (warning,) = listing.warnings
    assert warning.startswith(f"2 folders beside the classes hold no image and are none ({above}cow, {above}doc)")
    assert listing.index.labels.tolist() == [0, 0, 1]
    assert not open_source(zipped(tmp_path / "y.zip", members[:3])).listing().warnings


def test_what_a_tar_holds_is_said_when_no_kind_knows_it(tmp_path: Path) -> None:
    data = tar(tmp_path / "t.tar", [("a/x.txt", b"1"), ("a/y.npy", b"2")])
    with pytest.raises(UserError, match=r"1 × \.tar \(t\.tar begins with a/x\.txt, a/y\.npy\), expected one of these"):
        rows(data)


def test_names_in_a_zip_are_those_of_the_folder(tmp_path: Path) -> None:
    data = Path(zipped(tmp_path / "z.zip", [("ca__/0.png", b"1"), ("dog/0.png", b"2")]))
    data.write_bytes(data.read_bytes().replace(b"ca__", "caé".encode()))  # as macOS writes it: no flag says UTF-8
    assert [key for key, _, _ in rows(data)] == ["caé/0.png", "dog/0.png"]
    info = zipfile.ZipInfo("ca_/0.png")
    stated = b"\1" + zlib.crc32(b"ca_/0.png".replace(b"_", b"\xe9")).to_bytes(4, "little") + "caé/0.png".encode()
    info.extra = b"\x75\x70" + len(stated).to_bytes(2, "little") + stated
    data = Path(zipped(tmp_path / "z.zip", [(info, b"1"), ("dog/0.png", b"2")]))
    data.write_bytes(data.read_bytes().replace(b"ca_/", b"ca\xe9/"))  # as Info-ZIP does where names are Latin-1
    assert [key for key, _, _ in rows(data)] == ["caé/0.png", "dog/0.png"]
    backslashes = [(zipfile.ZipInfo(name.replace("/", "\\")), data) for name, data in BASE]
    assert rows(zipped(tmp_path / "z.zip", backslashes)) == rows(zipped(tmp_path / "y.zip", BASE))


def test_empty_zips_and_files_of_labels_in_capitals_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file"):
        rows(zipped(tmp_path / "e.zip", []))
    with pytest.raises(UserError, match=r"Dataset.JSON; of a zip one dataset.json is read"):
        rows(zipped(tmp_path / "z.zip", [*BASE, ("Dataset.JSON", b"{}")]))
    for name, data in BASE:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    (tmp_path / "d/Labels.csv").write_text("file,label\n")
    with pytest.raises(UserError, match=r"Labels.csv, .*rename it labels.csv .*or pass --source image-folder"):
        rows(tmp_path / "d")


def test_what_a_folder_holds_takes_neither_memory_nor_time_without_end(tmp_path: Path) -> None:
    for name, data in BASE:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    whole = rows(tmp_path / "d")
    (tmp_path / "d/above").symlink_to("..")
    (tmp_path / "d/classes.txt").symlink_to("/dev/zero")
    (tmp_path / "d/__pycache__").mkdir()
    os.mkfifo(tmp_path / "d/cat/pipe.png")
    assert rows(tmp_path / "d") == whole
    os.truncate(tmp_path / "d/cat/0.png", 5 << 30)
    (tmp_path / "d/cat/1.png").unlink()
    (tmp_path / "d/cat/1.png").symlink_to("1.png")
    first, second, _ = (sample for _, _, sample in rows(tmp_path / "d"))
    assert isinstance(first, Unreadable)
    assert isinstance(second, Unreadable)
    os.mkfifo(tmp_path / "p.zip")
    for data in (tmp_path / "p.zip", tmp_path / "p.tar"):
        if data.suffix == ".tar":
            data.symlink_to("/dev/zero")
        with pytest.raises(UserError, match="is not a regular file"):
            open_source(str(data)).listing()


def test_folders_that_link_to_each_other_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.files.LINKS_WITHIN_LINKS", 50)
    for name in "abcdef":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"x")
    assert len(rows(tmp_path)) == 6
    for name in "abcdef":
        for other in set("abcdef") - {name}:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")
    with pytest.raises(UserError, match="more than 50 folders are reached over links within links"):
        rows(tmp_path)


def test_leftovers_that_a_pattern_matches_are_said(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        tar(tmp_path / f"{name}.tar", [("0.png", b"x")])
    (tmp_path / "._cat.tar").write_bytes(b"\0\5\x16\7")
    listing = open_source(f"{tmp_path}/*.tar").listing()
    assert listing.left_out == ("._cat.tar",)
    assert "._*" in listing.warnings[0]
    assert not leftover("recycle/found/icon/trash/0.png")


def test_object_stores_are_listed_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def entries(_: RemoteFiles, folder: str) -> Entries:
        threads.add(threading.get_ident())
        time.sleep(0.002)
        return Entries([], [File(f"{folder}/{i}.png", 1) for i in range(1000)], [])  # 2 µs each, as a disk's

    monkeypatch.setattr(RemoteFiles, "entries", entries)
    folders = tuple(f"n{i:02d}" for i in range(32))
    below, _ = DataEntries("s3://b/d", RemoteFiles("s3://b/d"), folders, (), is_folder=True).walk()
    assert [files[0].path for files in below] == [f"{folder}/0.png" for folder in folders]
    assert len(threads) > 2


NUMBERS = [
    b"\xff" * 12,
    b"777777777777",
    b"\x80" + bytes(10) + b"\1",
    b"\x80" + b"\xff" * 11,
    b"-1\0",
    b" " * 12,
    b"0" * 12,
]
NAMES = [b"../x.png\0", b"/a.png\0", b"1.png\0", b"\0", b"\xff\xfe.png\0", b"x/\0", b".\0", b"a/../1.png\0", b"3.png\0"]
FIELDS = {
    0: NAMES,
    157: NAMES,
    124: NUMBERS,
    386: NUMBERS,
    398: NUMBERS,
    410: NUMBERS,
    483: NUMBERS,
    482: [b"\0", b"\1"],
}
FIELDS[156] = [bytes([kind]) for kind in b"0\x00001234567LKxgXSNMVDZ"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Tars with sparse members, links and long names, and zips."""
    root = tmp_path_factory.mktemp("originals")
    cat = root / "cat"
    cat.mkdir()
    with open(cat / "0.png", "wb") as file:
        for at in range(8192, 90_000, 16384):
            file.seek(at)
            file.write(b"a" * 4096)
        file.truncate(100_000)
    (cat / "1.png").write_bytes(b"one")
    os.link(cat / "1.png", cat / "2.png")
    (cat / "3.png").symlink_to("1.png")
    (cat / ("n" * 120 + ".png")).write_bytes(b"long")
    made = {}
    for version in ("gnu", "0.0", "0.1", "1.0"):
        options = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
        subprocess.run(["tar", "-S", "-b1", *options, "-cf", root / "x.tar", "-C", cat, "."], check=True)
        made[f"class-tars {version}"] = (root / "x.tar").read_bytes()
    tar(root / "o.tar", [("cat.tar", made["class-tars gnu"])])
    made["tar-of-tars"] = (root / "o.tar").read_bytes()
    labels = json.dumps({"labels": [["cat/0.png", 1], ["dog/0.png", 2], ["cat/1.png", 0]]}).encode()
    zipped(root / "z.zip", [*BASE, (link("dog/1.png"), b"0.png"), ("dataset.json", labels)])
    made["zip"] = (root / "z.zip").read_bytes()
    return made


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from([*(f"class-tars {v}" for v in ("gnu", "0.0", "0.1", "1.0")), "tar-of-tars", "zip"]),
       chance=st.randoms(use_true_random=False), unlabelled=st.booleans())  # fmt: skip
def test_whatever_its_fields_say_a_container_is_read_or_refused(
    tmp_path: Path, originals: dict[str, bytes], kind: str, chance: random.Random, unlabelled: bool
) -> None:
    raw = bytearray(originals[kind])
    headers = [at for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"]
    for _ in range(chance.randint(1, 3)):
        if kind == "zip":
            at = chance.randrange(len(raw))
            edit = chance.choice([b"\xff" * 4, bytes(4), bytes(1), b"\xff" * 8, chance.randbytes(2)])
            raw[at : at + len(edit)] = edit
            continue
        at, field = chance.choice(headers), chance.choice(list(FIELDS))
        edit = chance.choice(FIELDS[field])
        raw[at + field : at + field + len(edit)] = edit
        raw[at + 148 : at + 156] = b" " * 8
        raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])  # `tarfile` would stop before the field else
    path = tmp_path / ("x.zip" if kind == "zip" else "x.tar")
    path.write_bytes(raw)
    message = ""
    try:
        source = open_source(str(path), kind.split()[0])
        listing = source.listing(LabelOptions(unlabelled=unlabelled))
        assert all(isinstance(sample, bytes | Unreadable) for sample in source.read_many(listing.index.locations))
    except (UserError, OSError) as error:
        message = str(error)
    assert "\n" not in message
