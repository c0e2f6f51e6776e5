"""`python -m pipeline index`: what is there, what is left out and what is odd, on one screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.sources import KINDS
from storage.base.console import EXIT_OK, run_command
from tests.pipeline.containers import WRITERS, photographs

SAMPLES = photographs(3, 4)


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_is_reported(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, write = WRITERS[name]
    assert main(["index", write(tmp_path / "x", SAMPLES)]) == EXIT_OK
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["kind"] == kind
    assert lines["images"] == "12"
    assert lines["classes"] == "3: n00000000, n00000001, n00000002"
    assert "label 0" in lines["first"]
    assert "pixels" in lines["first"]
    assert "label 2" in lines["last"]
    assert "warning" not in lines


def test_a_long_listing_is_not_silent(tmp_path: Path, waits: list[str]) -> None:
    WRITERS["image-folder"][1](tmp_path, SAMPLES)
    assert main(["index", str(tmp_path)]) == EXIT_OK
    assert list(dict.fromkeys(waits)) == ["loading libraries", f"listing {tmp_path}"]


def test_what_is_left_out_and_what_is_odd_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["image-folder"][1](tmp_path, SAMPLES)
    (tmp_path / "n00000003").mkdir()
    (tmp_path / "n00000000/AAA.png").write_bytes(b"")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "n00000002/notes.txt").write_text("")
    assert main(["index", str(tmp_path)]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "first      n00000000/AAA.png, label 0, which cannot be decoded: empty file (0 bytes)" in printed
    assert "sizes      0 bytes (n00000000/AAA.png) to " in printed
    assert "left out   2 files" in printed
    assert "           README.md\n           n00000002/notes.txt\n" in printed
    assert "warning    1 of 4 classes have no image, such as n00000003" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "does not exist"),
        (["/nowhere/at/all", "--source", "lmdb"], f"must be one of {', '.join(KINDS)}"),
        (["s3x://bucket"], "Protocol not known"),
        ([""], "DATA is empty"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(main, "python -m pipeline", ["index", *arguments])
    assert end.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
