"""`python -m storage derive`: codes have the bytes that the parent's tokens encode to, however made."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import Failure, Staging, StoreError, UserError, open_store, publish_unit
from storage.__main__ import main
from storage.base.console import EXIT_INTERRUPTED, EXIT_OK
from storage.codecs import CODECS
from storage.codecs.int8 import INT8
from storage.derive import derive_group, derived
from storage.receipts import Receipt, read_receipt
from storage.statistics import unit_sums
from storage.verify import verify
from tests.slow import slow_but
from tests.stores import FEATURES, LATENTS, decoded, encoded, make_layouts, make_store, publish_all

CHILD = f"{FEATURES}-rotated2"
FAILED = [3, 17]
KEYS = [f"class{row % 5}/{row:05d}" for row in range(40)]
UNIT_ROWS, WIDTH = 2, 512
QUICK_KILLS, KILLS = 3, 20


def shards(root: Path, group: str) -> dict[str, bytes]:
    """The bytes of a group's shards, and of its arrays' metadata."""
    files = [path for path in sorted((root / group).glob("*/**/*")) if path.is_file()]
    return {str(path.relative_to(root / group)): path.read_bytes() for path in files}


def reference(root: Path, spelling: str, tokens: np.ndarray, cls: np.ndarray, failed: list[int]) -> dict[str, bytes]:
    """The shards of a group that is published of `codec.encode`, in the store at `root`."""
    store = open_store(root)
    layout, identity = derived(store.group(FEATURES), "features/reference", CODECS[spelling])
    arrays = {**encoded(tokens, CODECS[spelling]), "cls": cls}
    with Staging(root) as staging:
        publish_all(root, layout, identity, arrays, [f"{row:05d}" for row in range(len(cls))], failed, staging)
    return shards(root, layout.path)


def unlike(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Files that are not the same, or not in both."""
    return [path for path in sorted({*found, *expected}) if found.get(path) != expected.get(path)]


def receipts(root: Path, group: str) -> list[Receipt]:
    store = open_store(root)
    layout = store.group_layout(group)[0]
    found = [read_receipt(store.root, layout, unit) for unit in range(layout.store.n_units)]
    return [receipt for receipt in found if receipt is not None]


@pytest.mark.parametrize("n_views", [1, 2])
def test_bytes_are_those_of_the_codec_whatever_the_workers(tmp_path: Path, n_views: int) -> None:
    data = make_store(tmp_path, n_views=n_views, failed_rows=FAILED)[FEATURES]
    expected = reference(tmp_path, "rotated2", data["patches"], data["cls"], FAILED)
    for n_workers in (1, 2):
        path = derive_group(tmp_path, "tiny-vit", "rotated2", name=f"by-{n_workers}", n_workers=n_workers)
        assert unlike(shards(tmp_path, path), expected) == []
    assert list(verify(tmp_path, deep=True, n_workers=1)) == []
    of = {group: open_store(tmp_path).group(group).failures for group in (FEATURES, "features/by-1")}
    assert of[FEATURES] == of["features/by-1"] != []


@pytest.mark.parametrize("spelling", ["int8", "rotated1"])
def test_other_codecs_by_the_command(tmp_path: Path, spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_store(tmp_path)[FEATURES]
    expected = reference(tmp_path, spelling, data["patches"], data["cls"], [])
    assert main(["derive", str(tmp_path), FEATURES, "--codec", spelling, "--workers", "1"]) == EXIT_OK
    child = f"{FEATURES}-{spelling}"
    assert unlike(shards(tmp_path, child), expected) == []
    assert main(["ls", str(tmp_path)]) == EXIT_OK
    assert main(["info", f"{tmp_path}/{child}"]) == EXIT_OK
    out = capsys.readouterr().out
    for what in (child, "\nderived  ", "3/3 done"):
        assert what in out
    assert main(["diff", f"{tmp_path}/{child}", f"{tmp_path}/features/reference"]) == EXIT_OK
    assert main(["diff", f"{tmp_path}/{child}", f"{tmp_path}/{FEATURES}"]) == 1
    lines = capsys.readouterr().out
    assert "derived_from" in lines
    assert "cls" not in lines
    assert main(["derive", str(tmp_path), "tiny-vit", "--codec", spelling]) == EXIT_OK
    assert "0 of 3 units new" in capsys.readouterr().out


def test_the_identity_is_the_parents_with_another_codec(tmp_path: Path) -> None:
    make_store(tmp_path)
    parent = open_store(tmp_path).group(FEATURES)
    plain = derived(parent, CHILD, CODECS["rotated2"])[1].plain()
    origin = {"identity_digest": parent.identity_digest, "dtype": "float16"}
    changed = {"codec": {"name": "rotated", "bits": 2}, "dtype": "uint8", "derived_from": origin}
    assert plain == {**parent.identity.plain(), **changed}


def test_codes_of_int8_are_of_its_numbers_and_say_so(tmp_path: Path) -> None:
    data = make_store(tmp_path, codec=INT8)[FEATURES]
    expected = reference(tmp_path, "rotated4", decoded(data, INT8), data["cls"], [])
    child = derive_group(tmp_path, FEATURES, "rotated4", n_workers=1)
    assert unlike(shards(tmp_path, child), expected) == []
    identity = open_store(tmp_path).group(child).identity
    assert identity.derived_from["codec"] == {"name": "int8", "group_channels": 128}


def republish(root: Path, unit: int, arrays: dict[str, np.ndarray], failed: list[int], **more: Any) -> None:
    """A unit of the parent, as the pipeline does it again."""
    store = open_store(root)
    layout, attributes = store.group_layout(FEATURES)
    rows = layout.store.unit_rows(unit)
    with Staging(root) as staging:
        staging.prepare(FEATURES)
        failures = [Failure(row=row, key=KEYS[row], reason="torn") for row in failed if row in rows]
        cut = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
        before = read_receipt(store.root, layout, unit)
        publish_unit(root, layout, attributes["identity_digest"], unit, cut, failures, staging.run_id, {},
                     replaces=before, **more)  # fmt: skip


def test_checksums_and_statistics_are_carried_over_and_mended_rows_derived_again(tmp_path: Path) -> None:
    data = make_store(tmp_path, failed_rows=FAILED)[FEATURES]
    layout = make_layouts(open_store(tmp_path).layout)[FEATURES]
    crcs = np.arange(100, 116, dtype=np.uint32)
    sums = unit_sums(layout, data, np.arange(16), CODECS["float16"], 0)
    statistics = {name: of.packed() for name, of in sums.items()}
    republish(tmp_path, 0, data, FAILED, sample_crc32c=crcs, statistics=statistics)
    derive_group(tmp_path, FEATURES, "rotated2", n_workers=1)
    child, parent = (receipts(tmp_path, path)[0] for path in (CHILD, FEATURES))
    assert child.sample_crc32c == parent.sample_crc32c != ""
    assert child.failed == parent.failed
    assert child.failed[0].reason == "torn"
    assert child.statistics == {name: parent.statistics[name] for name in ("cls", "cls.norm")}

    republish(tmp_path, 1, data, [])  # row 17 was mended
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / CHILD).glob("patches/c/*/0/0/0"))]
    derive_group(tmp_path, FEATURES, "rotated2", n_workers=1)
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / CHILD).glob("patches/c/*/0/0/0"))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert [failure.row for failure in open_store(tmp_path).group(CHILD).failures] == [3]
    assert unlike(shards(tmp_path, CHILD), reference(tmp_path, "rotated2", data["patches"], data["cls"], [3])) == []


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s")

    def derive(*argv: str, root: Path = tmp_path / "s") -> None:
        main(["derive", str(root), *argv])

    with pytest.raises(UserError, match=r"latents/tiny-vae are latents"):
        derive(LATENTS, "--codec", "rotated2")
    with pytest.raises(UserError, match=r"--codec.*rotated2"):
        derive("tiny-vit", "--codec", "float16")
    with pytest.raises(UserError, match=r"--workers must be at least 0"):
        derive("tiny-vit", "--codec", "rotated2", "--workers", "-1")
    with pytest.raises(StoreError, match=r"no features/other; it has"):
        derive("other", "--codec", "rotated2")
    with pytest.raises(UserError, match=r"no name begins with a dot"):
        derive("tiny-vit", "--codec", "rotated2", "--name", ".x")
    with pytest.raises(StoreError, match=r"derived_from: found nothing.*choose another --name"):
        derive("tiny-vit", "--codec", "rotated2", "--name", "tiny-vit")
    monkeypatch.setattr("storage.space.free_bytes", lambda root: 1000.0)
    with pytest.raises(UserError, match=r"has 0\.0 MB free and .* MB are to be written"):
        derive("tiny-vit", "--codec", "rotated4")
    assert open_store(tmp_path / "s").groups() == [LATENTS, FEATURES]  # nothing was begun
    (tmp_path / "s" / "receipts" / FEATURES / "00000001.json").unlink()
    with pytest.raises(StoreError, match=r"is not complete: 1 of 3 units"):
        derive("tiny-vit", "--codec", "rotated2")
    already = r"features/tiny-vit is int8 already, and nothing is to be done; .*: rotated1, rotated2, rotated4$"
    for codec, said in (("rotated2", r"errors would add up; derive from the group of float16"), ("int8", already)):
        make_store(tmp_path / codec, codec=CODECS[codec])
        with pytest.raises(UserError, match=said):
            derive("tiny-vit", "--codec", codec, root=tmp_path / codec)


def test_a_token_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    patches = np.ones((40, 1, 64, 24), dtype=np.float16)
    patches[21, 0, 5, 7] = np.nan
    make_store(tmp_path, features={"patches": patches})
    with pytest.raises(UserError, match=rf"{FEATURES}, row 21, .* token \(0, 5\) holds NaN.*or remove {CHILD} and "):
        derive_group(tmp_path, FEATURES, "rotated2", n_workers=1)
    assert 1 not in [receipt.unit for receipt in receipts(tmp_path, CHILD)]
    (tmp_path / "receipts" / FEATURES / "00000001.json").unlink()  # as the message says
    make_store(tmp_path, features={"patches": np.ones_like(patches)}, missing_only=True)
    derive_group(tmp_path, FEATURES, "rotated2", n_workers=1)
    assert list(verify(tmp_path, deep=True, n_workers=1)) == []


def test_a_group_that_is_not_finished_names_the_command_that_finishes_it(tmp_path: Path) -> None:
    make_store(tmp_path)
    derive_group(tmp_path, FEATURES, "rotated2", n_workers=1)
    for group, command in ((CHILD, f"python -m storage derive STORE {FEATURES} …"), (FEATURES, "make precompute")):
        unit, metadata = (tmp_path / "receipts" / group / f"{name}.json" for name in ("00000001", "metadata"))
        unit.unlink()
        with pytest.raises(
            StoreError, match=f"is not complete: 1 of 3 .*; run the same `{command}` again to finish it"
        ):
            open_store(tmp_path).group(group)
        metadata.unlink()
        with pytest.raises(StoreError, match=f"is missing; run the same `{command}` again to restore it"):
            open_store(tmp_path).group(group)


def start(root: Path, n_workers: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "storage", "derive", str(root), "tiny-vit", "--codec=rotated2"]
    return subprocess.Popen(
        [*argv, f"--workers={n_workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_units(root: Path, n: int, child: subprocess.Popen[str]) -> None:
    while len(list((root / "receipts" / CHILD).glob("0*.json"))) < n:
        assert child.poll() is None, child.communicate()
        time.sleep(0.001)


@pytest.mark.parametrize("number", slow_but([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_a_signal_keeps_what_is_finished(tmp_path: Path, number: signal.Signals) -> None:
    make_store(tmp_path, n_rows=40 * UNIT_ROWS, shard_rows=UNIT_ROWS, width=WIDTH)
    child = start(tmp_path, 1)
    wait_for_units(tmp_path, 2, child)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == EXIT_INTERRUPTED, said
    assert "what was finished is kept" in said
    assert "Traceback" not in said
    assert 2 <= len(receipts(tmp_path, CHILD)) < 40
    assert not list((tmp_path / CHILD).glob(".staging"))
    assert all("not done" in line or "no receipt" in line for line in verify(tmp_path, deep=True, n_workers=1))


def killed(tmp_path: Path, n_kills: int) -> None:
    """Kill one derivation again and again, then finish it."""
    make_store(tmp_path, n_rows=(n_kills + 1) * 5 * UNIT_ROWS, shard_rows=UNIT_ROWS, width=WIDTH)
    expected = shards(tmp_path, derive_group(tmp_path, FEATURES, "rotated2", name="undisturbed", n_workers=2))
    rng = np.random.default_rng(n_kills)
    for _ in range(n_kills):
        n_done = len(list((tmp_path / "receipts" / CHILD).glob("0*.json")))
        child = start(tmp_path, 2)
        wait_for_units(tmp_path, n_done + int(rng.integers(0, 4)), child)
        time.sleep(rng.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)  # until its workers, who hold its stderr, have ended too
        assert child.returncode == -signal.SIGKILL
        for path, raw in shards(tmp_path, CHILD).items():
            if not path.startswith("."):
                assert raw == expected[path], path
    done = {receipt.unit: receipt.made for receipt in receipts(tmp_path, CHILD)}
    derive_group(tmp_path, FEATURES, "rotated2", n_workers=2)
    assert unlike(shards(tmp_path, CHILD), expected) == []
    assert all(receipt.made == done.get(receipt.unit, receipt.made) for receipt in receipts(tmp_path, CHILD))
    strays = [path for path in tmp_path.rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert not strays
    assert list(verify(tmp_path, deep=True, n_workers=1)) == []


def test_killed_and_resumed(tmp_path: Path) -> None:
    killed(tmp_path, QUICK_KILLS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_more_often(tmp_path: Path) -> None:
    killed(tmp_path, KILLS)
