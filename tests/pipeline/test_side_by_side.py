"""Chains of commands beside each other: each in its order, their output in logs, a failure ends all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.side_by_side import side_by_side


def test_every_command_of_every_chain_runs_and_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], waits: list[str]
) -> None:
    side_by_side({"a": [["alignments"], ["--help"]], "b": [["--help"]]}, tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert waits[0] == "at work: a: alignments, b: --help"
    assert waits[-1] in ("at work: a: --help", "at work: b: --help", "at work: a: --help, b: --help")
    assert sorted(line.partition(" took")[0] for line in shown) == ["a: --help", "a: alignments", "b: --help"]
    log = (tmp_path / "a.log").read_text()
    assert log.index("irepa") < log.index("usage: python -m trainer")
    assert (tmp_path / "b.log").read_text().startswith("usage: python -m trainer")


def test_a_failure_is_shown_and_ends_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        side_by_side({"bad": [["train", "--store", ""], ["--help"]]}, tmp_path)
    assert end.value.code == 2
    shown = capsys.readouterr().out
    assert "no store was named" in shown
    assert f"bad: train failed; all that it said is in {tmp_path}/bad.log" in shown
    assert "usage" not in (tmp_path / "bad.log").read_text()
