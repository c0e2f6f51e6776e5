"""`python -m storage`: what it prints, its exit status, and mistakes on one line."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import StoreError, open_store, receipts
from storage.__main__ import PROG, main
from storage.base.console import EXIT_NOBODY_READS
from storage.codecs.int8 import INT8
from tests.commands import run_here
from tests.stores import FEATURES, LATENTS, make_store

Storage = Callable[..., tuple[int, str, str]]


@pytest.fixture
def storage(capsys: pytest.CaptureFixture[str]) -> Storage:
    """Exit status, output and errors of `python -m storage` with these words."""
    return lambda *argv: run_here(main, PROG, argv, capsys)


def test_ls_finds_stores_below_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "a" / "in128")
    make_store(tmp_path / "b", codec=INT8, n_views=2)
    (tmp_path / "b" / "receipts" / LATENTS / "00000002.json").unlink()
    assert main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"a/in128: 40 rows, views original, 128 px", out)
    assert re.search(
        r"features/tiny-vit  test  float16  cls 40×1×24 f2, patches 40×1×64×24 f2  \d.\d+ GB  complete", out
    )
    assert re.search(r"b: 40 rows, views original, hflip", out)
    assert re.search(r"features/tiny-vit  test  int8 .*scale 40×2×64×1 f2", out)
    assert re.search(r"latents/tiny-vae .* units 2/3", out)


def test_ls_goes_on_after_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lost+found").mkdir()
    make_store(tmp_path / "s")
    listdir = os.listdir

    def refusing(path: Path) -> list[str]:
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    assert main(["ls", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert LATENTS in shown.out
    assert shown.err == f"{tmp_path}/lost+found cannot be read and is left out\n"


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    command = subprocess.Popen(
        [sys.executable, "-m", "storage", "info", str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    command.stdout.close()
    _, err = command.communicate()
    assert command.returncode == EXIT_NOBODY_READS
    assert all(line.endswith(" …") for line in err.decode().splitlines()), "but for waits, on a slow machine"


def test_info_is_a_short_table(tmp_path: Path, storage: Storage) -> None:
    root = tmp_path / "s"
    make_store(root, failed_rows=[3])
    status, out, _ = storage("info", root / FEATURES)
    assert status == 0
    table = dict(line.split(None, 1) for line in out.splitlines() if line[:1].isalpha())
    assert table["layer"] == "norm"
    assert table["units"] == "3/3 done"
    assert table["samples"] == "1 failed"
    assert table["stored"].startswith("float16: cls 40×1×24 f2, patches 40×1×64×24 f2")
    assert "  row 3 class3/00003: test" in out.splitlines()
    assert len(out.splitlines()) < 25
    status, out, _ = storage("info", root)
    assert re.search(r"^samples  40, views original, 128 px$", out, re.MULTILINE)
    assert re.search(rf"^groups   {LATENTS}, {FEATURES}$", out, re.MULTILINE)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("group ")] == [
        str(root / LATENTS), str(root / FEATURES)
    ]  # fmt: skip
    assert "latents" in out
    assert not re.search(r'[{}"]', out), "no JSON for people"


def test_info_has_everything_as_json(tmp_path: Path, storage: Storage) -> None:
    root = tmp_path / "s"
    make_store(root, failed_rows=[3])
    store = open_store(root)
    found = json.loads(storage("info", root, "--json")[1])
    assert found["store"] == str(root)
    assert found["attributes"] == json.loads(json.dumps(store.attributes))
    assert [group["group"] for group in found["groups"]] == [LATENTS, FEATURES]
    for group in found["groups"]:
        attributes = store.group_layout(group["group"])[1]
        for name in ("identity", "identity_digest", "provenance"):
            assert group[name] == attributes.get(name, {})
    alone = json.loads(storage("info", root / FEATURES, "--json")[1])
    assert alone == found["groups"][1]
    assert alone["failed"] == [{"row": 3, "key": "class3/00003", "reason": "test"}]
    assert (alone["units"], alone["units_undone"]) == (3, {})
    (root / "receipts" / FEATURES / "00000001.json").unlink()
    assert list(json.loads(storage("info", root / FEATURES, "--json")[1])["units_undone"]) == ["1"]
    assert "2/3 done" in storage("info", root / FEATURES)[1]


def test_info_reads_each_receipt_once(tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request a receipt is what it costs in an object store."""
    root, read = tmp_path / "s", list[str]()
    make_store(root)
    unseal = receipts.unseal

    def counting(kind: type[Any], raw: bytes, at: str) -> Any:
        if kind is receipts.Receipt:  # a unit's, not the metadata's
            read.append(at)
        return unseal(kind, raw, at)

    monkeypatch.setattr(receipts, "unseal", counting)
    assert storage("info", root / FEATURES)[0] == 0
    assert sorted(read) == [str(root / "receipts" / FEATURES / f"0000000{unit}.json") for unit in range(3)]


def test_verify_exits_1_and_names_the_fault(tmp_path: Path, storage: Storage) -> None:
    root = tmp_path / "s"
    make_store(root)
    assert storage("verify", root)[0] == 0
    shard = root / FEATURES / "patches/c/1/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 1
    shard.write_bytes(raw)
    assert storage("verify", root)[0] == 0  # that takes reading
    status, out, _ = storage("verify", root, "--deep")
    assert status == 1
    assert f"shard {shard}, row 16, view 0: wrong checksum" in out
    assert "1 fault (every byte read)" in out
    status, out, _ = storage("verify", root / LATENTS, "--deep")  # one group
    assert (status, "no fault" in out) == (0, True)


def test_verify_counts_a_damaged_root_as_a_fault(tmp_path: Path, storage: Storage) -> None:
    make_store(tmp_path / "s")
    (tmp_path / "s" / "zarr.json").write_text("{")
    status, out, _ = storage("verify", tmp_path / "s")
    assert (status, "s/zarr.json was edited" in out, "1 fault" in out) == (1, True, True)


def test_diff_names_fields_samples_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_store(tmp_path / "a")
    make_store(tmp_path / "b", shard_rows=9)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    patches = a[FEATURES]["patches"].copy()
    patches[[5, 22]] += 1
    make_store(tmp_path / "c", features={"patches": patches}, failed_rows=[30])
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    out = capsys.readouterr().out
    assert f"{FEATURES}/patches: rows differ: 5, 22" in out
    assert f"{FEATURES}: rows failed in one of them only: 30" in out
    make_store(tmp_path / "d", width=48, n_classes=4)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "d")]) == 1
    out = capsys.readouterr().out
    assert "width: the first has 24, the second has 48" in out
    assert "index: label differs at rows: 4" in out
    group = [str(tmp_path / "a" / FEATURES), str(tmp_path / "c" / FEATURES)]
    assert main(["diff", *group]) == 1


def test_reading_receipts_is_not_silent(tmp_path: Path, storage: Storage, waits: list[str]) -> None:
    root = tmp_path / "s"
    make_store(root)
    for words, said in (
        (["ls", root], {f"looking for stores in {root}", "reading receipts"}),
        (["info", root], {"reading receipts"}),
        (["verify", root], {"reading receipts"}),
        (["diff", root, root], {"comparing receipts"}),
        (["export", root, "--to", "npy", "--out", tmp_path / "out"], {"opening the store"}),
    ):
        waits.clear()
        assert storage(*words)[0] == 0
        assert set(waits) == {"loading libraries", *said}, words


def test_mistakes_are_one_line(tmp_path: Path, storage: Storage) -> None:
    make_store(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    for argv, says in (
        (["ls", tmp_path / "nowhere"], "does not exist"),
        (["ls", tmp_path / "empty"], "is not a store"),
        (["info", tmp_path / "s/features/clip"], "has no features/clip; it has latents/tiny-vae, features/tiny-vit"),
        (["verify", tmp_path / "s/latents/x"], "has no latents/x"),
        (["ls", tmp_path / "s/latents"], "s/latents is not a store (its zarr.json is of something else); the store is"),
        (["info", tmp_path / "s/latents"], f"the store is {tmp_path / 's'}"),
        (["diff", tmp_path / "s", tmp_path / "s/latents"], f"the store is {tmp_path / 's'}"),
        (["verify", tmp_path / "s/latents"], f"the store is {tmp_path / 's'}"),
        (["diff", tmp_path / "s", tmp_path / "s" / LATENTS], "compare two stores or two groups"),
        (["export", tmp_path / "s", "--to", "csv", "--out", "x"], "must be one of"),
        (["ls", "ftp://x/y"], "a store lies in a directory or at s3://"),
    ):
        status, _, err = storage(*argv)
        assert status == 2, argv
        assert says in err
        assert len(err.strip().splitlines()) == 1


def test_a_group_s_name_may_end_as_a_shell_completes_it(tmp_path: Path, storage: Storage) -> None:
    make_store(tmp_path / "s")
    for argv in (
        ["statistics", tmp_path / "s", f"{FEATURES}/"],
        ["derive", tmp_path / "s", f"{FEATURES}/", "--codec", "int8"],
        ["derive", tmp_path / "s", f"{FEATURES.partition('/')[2]}/", "--codec", "rotated4"],
        ["info", f"{tmp_path / 's' / FEATURES}/"],
    ):
        status, out, err = storage(*argv)
        assert status == 0, err
        assert "//" not in out
    store = open_store(tmp_path / "s")
    store.group(f"{FEATURES}//").close()
    for path in ("features//tiny-vit", f"{FEATURES}/patches", "features/..", "features/.", "features/", "index"):
        with pytest.raises(StoreError, match=r"has no .*; it has latents/tiny-vae, features/tiny-vit"):
            store.group(path)


def test_what_is_listed_is_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "s")
    main(["info", str(tmp_path / "s" / LATENTS), "--json"])
    identity = json.loads(capsys.readouterr().out)["identity"]
    assert identity["latent_scale_factor"] == 0.5
    assert np.isclose(identity["latent_shift_factor"], 0)
