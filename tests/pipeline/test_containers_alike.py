"""A tree of classes has the same rows, labels and bytes as a folder, as class tars and as a zip, whatever lies in it.

Links, sparse files and what operating systems leave behind are made by the programs that people use: `tar`, `zipfile`,
the file system.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.sources import LabelOptions, Unreadable, open_source
from pipeline.sources.files import LocalFiles
from pipeline.sources.leftovers import leftover
from pipeline.sources.protocol import MAX_SAMPLE_BYTES
from storage.base.errors import UserError
from tests.examples import examples

LEFTOVERS = [
    "Thumbs.db",
    "._0.png",
    ".DS_Store",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/0.png",
    "lost+found/1.png",
    "$RECYCLE.BIN/S-1-5/2.png",
    "System Volume Information/x.png",
    "#recycle/0.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    ".Trash-1000/files/0.png",
    "DESKTOP.INI",
]
FORMATS = [
    ["--format=gnu"],
    *(["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")),
]
names = st.sampled_from(["0.png", "1.jpg", "sub/2.webp", "é ü.png", "a" * 120 + ".png", *LEFTOVERS])
holes = st.binary(max_size=20).map(lambda data: data + bytes(70_000) + data)
contents = st.one_of(
    st.binary(max_size=40), holes, st.integers(0, 3)
)  # an integer: a link to another file of the class


def make_tree(root: Path, tree: dict[str, dict[str, bytes | int]], links: str) -> None:
    """Class → name → bytes, or which of the class's files it is another name of; holes are holes on the disk."""
    for label, files in tree.items():
        (root / label).mkdir(parents=True)
        plain = [name for name, data in files.items() if isinstance(data, bytes)]
        for name, data in files.items():
            path = root / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, bytes):
                with open(path, "wb") as file:
                    for start in range(0, len(data), 4096):
                        block = data[start : start + 4096]
                        file.seek(start)
                        if block.strip(b"\0"):
                            file.write(block)
                    file.truncate(len(data))
        for name, data in files.items():
            if isinstance(data, int) and plain:
                target, path = root / label / plain[data % len(plain)], root / label / name
                if links == "hard":
                    os.link(target, path)
                else:
                    path.symlink_to(os.path.relpath(target, path.parent))


def rows_of(data: Path, kind: str) -> list[tuple[str, int, bytes]]:
    """Key below the class, label and bytes of every row."""
    source = open_source(str(data), kind)
    listing = source.listing(LabelOptions())
    samples = list(source.read_many(listing.index.locations))
    assert all(isinstance(sample, bytes) for sample in samples)
    return list(zip(listing.index.keys, listing.index.labels.tolist(), samples, strict=True))


@pytest.mark.parametrize("links", ["hard", "symbolic"])
@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(
        st.sampled_from(["cat", "dog", "fox"]), st.dictionaries(names, contents, min_size=1, max_size=6), min_size=2
    ),
    options=st.sampled_from(FORMATS),
)
def test_tars_and_zips_have_the_rows_of_the_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tree: dict[str, dict[str, bytes | int]],
    options: list[str],
    links: str,
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for files in tree.values():
        files["always.png"] = b"so that no class is empty"
    make_tree(root / "folder", tree, links)
    (root / "tars").mkdir()
    for label in tree:
        command = [
            "tar",
            "--sparse",
            *options,
            "-cf",
            root / "tars" / f"{label}.tar",
            "-C",
            root / "folder" / label,
            ".",
        ]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(root / "tree.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((root / "folder").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root))
    expected = rows_of(root / "folder", "image-folder")
    assert not any(leftover(key) for key, _, _ in expected)
    assert rows_of(root / "tars", "class-tars") == expected
    assert [(key.removeprefix("folder/"), *row) for key, *row in rows_of(root / "tree.zip", "zip")] == expected


@pytest.mark.parametrize("junk", LEFTOVERS)
def test_leftovers_are_left_out_of_every_kind_and_said(tmp_path: Path, junk: str) -> None:
    tree = {"cat": {"0.png": b"a", junk: b"x"}, "dog": {"0.png": b"b"}, junk.split("/")[0] + "/x": {"9.png": b"c"}}
    make_tree(tmp_path / "folder", {k: v for k, v in tree.items() if "/" in junk or "x" not in k}, "hard")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for path in sorted(p for p in (tmp_path / "folder").rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(tmp_path / "folder"))
    (tmp_path / "tars").mkdir()
    for label in ("cat", "dog"):
        subprocess.run(
            ["tar", "-cf", tmp_path / "tars" / f"{label}.tar", "-C", tmp_path / "folder" / label, "."], check=True
        )
    (tmp_path / "tars" / f"._{label}.tar").write_bytes(b"\0\5\x16\7")  # as macOS copies to a foreign disk
    for data, kind in (("folder", "image-folder"), ("t.zip", "zip"), ("tars", "class-tars")):
        listing = open_source(str(tmp_path / data)).listing()
        assert open_source(str(tmp_path / data)).kind == kind
        assert [key.split("/")[-2:] for key in listing.index.keys] == [["cat", "0.png"], ["dog", "0.png"]]
        assert listing.index.class_names == ["cat", "dog"]
        assert listing.left_out
        assert any("leftovers" in warning for warning in listing.warnings)


def test_names_that_only_resemble_leftovers_are_samples(tmp_path: Path) -> None:
    make_tree(tmp_path / "t", {"trash": {"thumbs.png": b"1", "eaDir.png": b"2"}, "lost": {"found.png": b"3"}}, "hard")
    assert len(rows_of(tmp_path / "t", "image-folder")) == 3


def zip_of(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


LABELS = json.dumps({"labels": [[f"{i // 2}/{i}.png", i % 3] for i in range(6)]}).encode()
IMAGES = {f"{i // 2}/{i}.png": b"%d" % i for i in range(6)}


@pytest.mark.parametrize("folder", ["", "mydata/", "a/b/"])
def test_dataset_json_is_read_wherever_it_lies(tmp_path: Path, folder: str) -> None:
    members = {folder + name: data for name, data in {**IMAGES, "dataset.json": LABELS}.items()}
    listing = open_source(zip_of(tmp_path / "z.zip", members)).listing()
    assert listing.index.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert listing.left_out == ()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"b/dataset.json": LABELS}, r"a/dataset.json, b/dataset.json; of a zip one dataset.json is read"),
        ({"a/labels.csv": b"file,label\n"}, r"a/labels.csv.*no other file of labels"),
        ({"b/x.png": b"1"}, r"1 of 7 images have no label"),
        (
            {"a/dataset.json": LABELS.replace(b'"0/', b'"a/0/').replace(b'"1/', b'"a/1/').replace(b'"2/', b'"a/2/')},
            r"none of the 6 images that a/dataset.json in z.zip in DATA names is there, such as a/a/0/0.png",
        ),
        ({"a/dataset.json": b'{"labels": [["0/0.png", 1]], "labels": [["0/1.png", 0]]}'}, "has the key 'labels' twice"),
    ],
)
def test_labels_that_do_not_cover_the_zip_are_refused(tmp_path: Path, more: dict[str, bytes], message: str) -> None:
    members = {"a/" + name: data for name, data in {**IMAGES, "dataset.json": LABELS}.items()} | more
    with pytest.raises(UserError, match=message):
        open_source(zip_of(tmp_path / "z.zip", members)).listing()


def test_a_file_of_labels_below_class_folders_is_refused(tmp_path: Path) -> None:
    for name in ("dataset.json", "labels.csv"):
        make_tree(tmp_path / name / "d", {"mydata": {"0/0.png": b"1", name: b""}, "other": {"1.png": b""}}, "hard")
        with pytest.raises(UserError, match=f"mydata/{name}.*name DATA=.*/d/mydata .*--source image-folder"):
            open_source(str(tmp_path / name / "d")).listing()
        assert len(open_source(str(tmp_path / name / "d"), "image-folder").listing().index) == 2


@pytest.mark.parametrize("beside", [None, "other/readme.txt", "empty/.keep"])
def test_strays_beside_class_folders_are_left_out_alike(tmp_path: Path, beside: str | None) -> None:
    without_images = {beside: b"t"} if beside else {}
    tree = without_images | {
        "pets/cover.png": b"c",
        **{f"pets/{c}/{i}.png": b"x" for c in ("cat", "dog", "fox") for i in range(3)},
    }
    listing = open_source(zip_of(tmp_path / "z.zip", tree)).listing()
    assert listing.index.class_names == ["cat", "dog", "fox"]
    assert set(listing.left_out) == {"pets/cover.png", *without_images}
    with zipfile.ZipFile(tmp_path / "z.zip") as archive:
        archive.extractall(tmp_path / "d")
    inner = open_source(str(tmp_path / "d/pets")).listing()
    assert (inner.index.labels == listing.index.labels).all()
    assert inner.left_out == ("cover.png",)
    with pytest.raises(UserError, match=r"one folder, pets, .*cat, dog, fox.*name .*/d/pets, or pass --source"):
        open_source(str(tmp_path / "d")).listing()
    assert set(open_source(str(tmp_path / "d"), "image-folder").listing().index.class_names) - {""} >= {"pets"}


def test_a_folder_that_may_be_a_class_or_hold_them_is_refused(tmp_path: Path) -> None:
    tree = {**{f"cat/{i}.png": b"x" for i in range(5)}, "cat/a/0.png": b"", "cat/b/0.png": b""}
    with pytest.raises(UserError, match=r"5 images of cat stand beside its folders \(a, b\)"):
        open_source(zip_of(tmp_path / "z.zip", tree)).listing()


def test_a_zip_from_windows_has_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("cat\\0.png", "dog\\0.png"):
            info = zipfile.ZipInfo(name)
            info.create_system = 0
            archive.writestr(info, b"x")
    assert open_source(str(tmp_path / "z.zip")).listing().index.class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["../cat/0.png", "cat/../../0.png"])
def test_members_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    zip_of(tmp_path / "z.zip", {name: b"x", "dog/0.png": b"y"})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    for data, kind in ((tmp_path / "z.zip", "zip"), (tmp_path, "class-tars")):
        with pytest.raises(UserError, match="leads out of the folder"):
            open_source(str(data), kind).listing()


def bomb(name: str, nbytes: int, declared: int) -> bytes:
    """A zip of zeros that says how much it inflates to, or lies."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = bytes(1 << 20)
    crc, packed = 0, []
    for _ in range(nbytes >> 20):
        packed.append(stream.compress(block))
        crc = zlib.crc32(block, crc)
    body = b"".join([*packed, stream.flush()])
    raw, sizes = name.encode(), [crc, len(body), declared, len(name), 0]
    local = b"PK\3\4" + np.array([20, 0, 8, 0, 0], "<u2").tobytes() + _sizes(sizes) + raw + body
    entry = b"PK\1\2" + np.array([20, 20, 0, 8, 0, 0], "<u2").tobytes() + _sizes(sizes) + bytes(14) + raw
    end = b"PK\5\6" + np.array([0, 0, 1, 1], "<u2").tobytes()
    return local + entry + end + np.array([len(entry), len(local)], "<u4").tobytes() + b"\0\0"


def _sizes(sizes: list[int]) -> bytes:
    return np.array(sizes[:3], "<u4").tobytes() + np.array(sizes[3:], "<u2").tobytes()


@pytest.mark.parametrize("declared", [MAX_SAMPLE_BYTES + (1 << 20), 1000])
def test_a_member_never_inflates_beyond_what_it_declares_or_a_bound(tmp_path: Path, declared: int) -> None:
    (tmp_path / "z.zip").write_bytes(bomb("cat/0.png", MAX_SAMPLE_BYTES + (1 << 20), declared))
    source = open_source(str(tmp_path / "z.zip"))
    locations = source.listing().index.locations
    (sample,) = source.read_many(locations)
    assert isinstance(sample, Unreadable)
    assert ("an encoded image may have" if declared > 1000 else "does not have the 1,000 bytes") in sample.reason


def test_labels_never_inflate_beyond_what_their_members_explain(tmp_path: Path) -> None:
    (tmp_path / "z.zip").write_bytes(bomb("dataset.json", 300 << 20, 300 << 20))
    with pytest.raises(UserError, match=r"dataset.json declares 314,572,800 bytes, for the 1 members"):
        open_source(str(tmp_path / "z.zip")).listing()


def test_an_old_location_in_a_zip_is_read(tmp_path: Path) -> None:
    source = open_source(zip_of(tmp_path / "z.zip", {"cat/0.png": b"some bytes", "dog/0.png": b"others"}))
    locations = [location.rpartition(":")[0] for location in source.listing().index.locations]
    assert list(source.read_many(locations)) == [b"some bytes", b"others"]


def test_hard_links_that_name_nothing_are_refused(tmp_path: Path) -> None:
    for name, linked in (("a", "gone.png"), ("b", "loop.png")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            info = tarfile.TarInfo("0.png")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
            link = tarfile.TarInfo("loop.png")
            link.type, link.linkname = tarfile.LNKTYPE, linked
            archive.addfile(link)
    for name in ("a", "b"):
        only = tmp_path / name
        only.mkdir()
        (tmp_path / f"{name}.tar").rename(only / "x.tar")
        (only / "y.tar").write_bytes((only / "x.tar").read_bytes())
        with pytest.raises(UserError, match=r"loop.png is a second name of .*, which the tar does not hold"):
            open_source(str(only), "class-tars").listing()


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    make_tree(tmp_path / "t", {"a": {"0.png": b"1"}, "b": {"0.png": b"2"}}, "hard")
    (tmp_path / "t/a/self").symlink_to(".")
    (tmp_path / "t/a/up").symlink_to("..")
    (tmp_path / "t/b/other").symlink_to("../a")
    (tmp_path / "t/a/other").symlink_to("../b")
    (tmp_path / "t/a/round.png").symlink_to("round.png")
    keys = open_source(str(tmp_path / "t")).listing().index.keys
    assert keys == ["a/0.png", "a/other/0.png", "a/round.png", "b/0.png", "b/other/0.png", "b/other/round.png"]


def test_an_entry_has_its_size_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(7))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/l.png").symlink_to("../x")
    assert [file.nbytes for file in LocalFiles(str(tmp_path)).entries("d").files] == [7]


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["zip", "class-tars", "tar-of-tars", "webdataset"]), st.data())
def test_whatever_the_bytes_of_a_container_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    if not root.exists():
        make_tree(root / "t", {"cat": {"0.png": b"1" * 9000 + bytes(9000), "1.png": 0}, "dog": {"0.png": b"z"}}, "hard")
        for label in ("cat", "dog"):
            subprocess.run(["tar", "-S", "-cf", root / f"{label}.tar", "-C", root / "t" / label, "."], check=True)
        subprocess.run(["tar", "-cf", root / "outer.tar", "-C", root, "cat.tar", "dog.tar"], check=True)
        with zipfile.ZipFile(root / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(root / "t/cat/0.png", "d/cat/0.png")
            archive.write(root / "t/dog/0.png", "d/dog/0.png")
            archive.writestr("d/dataset.json", json.dumps({"labels": [["cat/0.png", 0], ["dog/0.png", 1]]}))
    original = (root / {"zip": "z.zip", "tar-of-tars": "outer.tar"}.get(kind, "cat.tar")).read_bytes()
    raw = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        edit = data.draw(st.binary(min_size=1, max_size=12) | st.just(b"\xff" * 12) | st.just(b"777777777777"))
        raw[at : at + len(edit)] = edit
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    place = root / "edited"
    place.mkdir(exist_ok=True)
    name = "x.zip" if kind == "zip" else "x.tar"
    (place / name).write_bytes(raw)
    with contextlib.suppress(UserError, OSError):
        source = open_source(str(place / name), kind)
        listing = source.listing(LabelOptions(unlabelled=True))
        for sample in source.read_many(listing.index.locations):
            assert isinstance(sample, bytes | Unreadable)


def test_negative_and_endless_sizes_in_a_tar_end_at_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    raw = bytearray((tmp_path / "x.tar").read_bytes())
    for size in (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 8 + b"\0\0\0\0"):
        for kind in (b"0", b"L", b"x", b"g", b"S", b"1"):
            raw[124:136], raw[156:157] = size, kind
            raw[148:156] = b" " * 8
            raw[148:156] = b"%06o\0 " % sum(raw[:512])
            (tmp_path / "x.tar").write_bytes(raw)
            with contextlib.suppress(UserError):  # −1 of a sparse member reads as none
                assert open_source(str(tmp_path / "x.tar"), "class-tars").listing().index.keys == ["x/0.png"]
