"""A unit that is done again: killed at any moment it is as it was, done again, or not done; open readers notice."""

from __future__ import annotations

import base64
import dataclasses
import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from storage import Failure, GroupLayout, Staging, StoreError, open_store, publish_unit
from storage.receipts import read_receipt, seal, write_receipt
from storage.roots import open_root
from storage.verify import verify
from tests.storage.servers import s3_server
from tests.storage.test_kill import array_files
from tests.stores import FEATURES, LATENTS, make_layouts, make_store, random_arrays

N, SHARD_ROWS, WIDTH = 32, 16, 512
FAILED = {0: [3, 20], 1: [4, 21]}  # of either state: as many rows, so that files have the same sizes in both
NOT_FINISHED = "it was begun again and not finished"
QUICK_ROUNDS, ROUNDS = 5, 100
REDOER = """
import sys
from pathlib import Path
from tests.storage.test_redo import redo
sys.stdin.readline()
print("begun", flush=True)
for i in range(1, 1000):
    redo(Path(sys.argv[1]), i % 2)
"""


def make(root: Path | str) -> None:
    make_store(root, n_rows=N, shard_rows=SHARD_ROWS, width=WIDTH, failed_rows=FAILED[0])


def redo(root: Path | str, state: int) -> None:
    """Do every unit of both groups again: other rows fail, and every number differs."""
    store = open_store(root)
    with Staging(root) as staging:
        for seed, path in enumerate((LATENTS, FEATURES)):
            layout = make_layouts(store.layout, WIDTH)[path]
            staging.prepare(path)
            arrays = random_arrays(layout, seed + 10 * state)
            for unit in range(layout.store.n_units):
                rows = layout.store.unit_rows(unit)
                before = read_receipt(store.root, layout, unit)
                assert before is not None
                failed = [Failure(row=row, key=f"{row}", reason="test") for row in FAILED[state] if row in rows]
                cut = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
                publish_unit(root, layout, before.identity_digest, unit, cut, failed, staging.run_id, {},
                             replaces=before)  # fmt: skip


def kill_rounds(tmp_path: Path, rounds: range) -> None:
    expected = {}
    for state in (0, 1):
        make(tmp_path / f"whole{state}")
        redo(tmp_path / f"whole{state}", state)
        expected[state] = array_files(tmp_path / f"whole{state}")
    assert {name: len(raw) for name, raw in expected[0].items()} == {n: len(raw) for n, raw in expected[1].items()}
    n_not_done = 0
    for round_ in rounds:
        root = tmp_path / f"s{round_}"
        make(root)
        command = [sys.executable, "-c", REDOER, str(root)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "begun\n"
        time.sleep(np.random.default_rng(round_).uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        faults = list(verify(root, deep=True, n_workers=1))
        assert all(NOT_FINISHED in fault for fault in faults), faults  # what counts as done is whole to the last byte
        n_not_done += len(faults)
        for path in (LATENTS, FEATURES):
            if any(path in fault for fault in faults):
                with pytest.raises(StoreError, match=f"is not complete: .*{NOT_FINISHED}"):
                    open_store(root).group(path)
        redo(root, 1)
        assert array_files(root) == expected[1]
        assert not list(verify(root, deep=True, n_workers=1))
        assert not [path for path in root.rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert n_not_done or len(rounds) < ROUNDS  # some fell between two files of a unit


def test_killed_while_units_are_done_again(tmp_path: Path) -> None:
    kill_rounds(tmp_path, range(QUICK_ROUNDS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_more_often_while_units_are_done_again(tmp_path: Path) -> None:
    kill_rounds(tmp_path, range(QUICK_ROUNDS, QUICK_ROUNDS + ROUNDS))


def test_between_two_files_of_a_unit_the_old_receipt_speaks_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    monkeypatch.setattr("storage.writer.write_shard", _killed)
    with pytest.raises(KeyboardInterrupt):
        redo(tmp_path, 1)
    assert [NOT_FINISHED in fault for fault in verify(tmp_path)] == [True]
    root, layout = open_root(tmp_path), make_layouts(open_store(tmp_path).layout, WIDTH)[LATENTS]
    receipt = read_receipt(root, layout, 0)
    assert receipt is not None
    assert [failure.row for failure in receipt.failed] == [3]  # what it says of its rows is kept
    monkeypatch.undo()
    redo(tmp_path, 1)
    receipt = read_receipt(root, layout, 0)
    assert receipt is not None
    assert receipt.made["replaces"]["failed"] == [3]


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def read(reader: object, rows: list[int]) -> np.ndarray:
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)  # type: ignore[attr-defined]
    reader.read_into(rows, 0, out)  # type: ignore[attr-defined]
    return out


def test_a_reader_never_takes_a_shard_that_was_written_again_for_the_one_it_knew(tmp_path: Path) -> None:
    make(tmp_path)
    reader = open_store(tmp_path).group(LATENTS)["moments"]
    rows = [0, 5, 9]
    before = read(reader, rows)
    redo(tmp_path, 1)
    np.testing.assert_array_equal(read(reader, rows), before)  # its file is still open
    reader.opened.files._close_idle(0)
    with pytest.raises(StoreError, match="was written again while it was read; open the store again"):
        read(reader, rows)
    assert not np.array_equal(read(open_store(tmp_path).group(LATENTS)["moments"], rows), before)


def test_a_reader_of_an_object_store_notices_too() -> None:
    pytest.importorskip("obstore")
    with s3_server("bucket") as bucket:
        where = f"{bucket}/{uuid.uuid4().hex}"
        make(where)
        reader = open_store(where).group(LATENTS)["moments"]
        read(reader, [0, 5, 9])
        redo(where, 1)
        with pytest.raises(StoreError, match="row 0, view 0: wrong checksum"):
            read(reader, [0, 5, 9])


def test_receipts_of_before_are_read_and_know_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from storage.__main__ import main

    make(tmp_path)
    for path in tmp_path.glob("receipts/*/*/0*.json"):
        fields = json.loads(path.read_bytes())
        del fields["sample_crc32c"], fields["sha256"]
        path.write_bytes(seal(fields))
    assert not list(verify(tmp_path, deep=True, n_workers=1))
    assert main(["info", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2 units have no checksums of their images") == 2
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 0


@pytest.mark.parametrize("value", ["AAAA", "no base64!", base64.b64encode(bytes(4 * SHARD_ROWS + 4)).decode()])
def test_checksums_that_are_none_are_a_damaged_receipt(tmp_path: Path, value: str) -> None:
    make(tmp_path)
    root, layout = open_root(tmp_path), GroupLayout(path=LATENTS, arrays=())
    receipt = read_receipt(root, layout, 1)
    assert receipt is not None
    write_receipt(root, layout, dataclasses.replace(receipt, sample_crc32c=value), "run")
    json.loads((tmp_path / layout.receipt_key(1)).read_bytes())
    faults = list(verify(tmp_path))
    assert len(faults) == 1
    assert "00000001.json is damaged" in faults[0]
