"""`score`: from a run to its numbers, once; what it lacks is said before anything is drawn; and after kills."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main as describe
from pipeline.encoders.tiny import TINY_VAE
from storage.base.console import run_command
from storage.base.errors import UserError
from tests.commands import run_here
from trainer.__main__ import main
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.options import ScoreConfig
from trainer.evaluation.quality.record import read_record
from trainer.evaluation.score import score

N = 12


@pytest.fixture
def run(micro_run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "runs" / "micro"
    others = shutil.ignore_patterns("samples-*", "evaluations.jsonl", "report.html")  # what other tests drew of it
    shutil.copytree(micro_run, copy, ignore=others)
    return copy


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    pictures = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), dtype=np.uint8)
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    return tmp_path / "real"


def line(run: Path, reference: Path, *more: str) -> list[str]:
    options = ["--n", str(N), "--steps", "4", "--batch", "4", "--vae", str(TINY_VAE), "--device", "cpu"]
    return ["score", str(run), "--reference", str(reference), "--encoder", "tiny-vit", *options, *more]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Images are described in this process; the command lines that did."""
    lines: list[list[str]] = []

    run_process = subprocess.run

    def describing(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[3:4] != ["features"]:  # others than evaluate start processes too
            return run_process(command, **options)
        lines.append(command)
        with pytest.raises(SystemExit) as end:
            run_command(describe, "python -m pipeline", command[3:])
        assert isinstance(end.value.code, int)
        return subprocess.CompletedProcess(command, end.value.code)

    monkeypatch.setattr("trainer.evaluation.quality.description.subprocess.run", describing)
    return lines


def state(run: Path) -> dict[str, int]:
    """Every file, and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_is_scored_once_and_a_second_call_only_prints(
    run: Path, reference: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_here(main, "python -m trainer", line(run, reference, "--protocol", "repa"), capsys)
    assert status == 0, err
    assert "Fréchet distance (tiny-vit)" in out
    assert "not as repa was published:" in out
    assert "labels" not in out.split("not as repa was published:")[1].split("card:")[0], "labels are as published"
    assert "steps: 4, not 250" in out
    assert f"next: python -m trainer report {run.parent} --out {run.parent / 'report.html'}" in out
    (recorded,) = read_record(run)
    assert (recorded.card.n_images, recorded.card.labels, recorded.card.rounding) == (N, "random", "truncate")
    assert (run / "report.html").is_file()
    assert ["--check" in each for each in here] == [True, False]
    before = state(run)
    status, again, err = run_here(main, "python -m trainer", line(run, reference, "--protocol", "repa"), capsys)
    assert status == 0, err
    assert out.endswith(again), "the first call says what was described, too"
    assert err == ""
    assert state(run) == before
    assert len(here) == 2, "nothing was described again"
    (run / "evaluations.jsonl").unlink()  # as a kill between the two files leaves it
    status, *_ = run_here(main, "python -m trainer", line(run, reference, "--protocol", "repa"), capsys)
    assert [each.card for each in read_record(run)] == [recorded.card]
    assert len(here) == 2
    status, out, _ = run_here(main, "python -m trainer", line(run, reference, "--n-reference", "6"), capsys)
    assert status == 0
    assert [each.card.n_reference for each in read_record(run)] == [9, 6]
    status, _, err = run_here(main, "python -m trainer", line(run, reference, "--protocol", "repa", "--n=5"), capsys)
    assert status == 2
    assert f"holds {N} images, more than --n 5" in err


def test_what_is_missing_is_said_before_anything_is_drawn(
    run: Path, reference: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    for options, message in (
        (["--encoder", "inception"], "Inception's weights are not in"),
        (["--reference", str(tmp_path / "nowhere")], "does not exist and is no folder"),
        (["--reference", str(tmp_path / "narrow.npz"), "--encoder", "inception"], "has a mean of 5 numbers"),
        (["--protocol", "rae"], "pass --weaker RUN"),
        (["--vae", ""], "does not say what decodes it"),
    ):
        status, out, err = run_here(main, "python -m trainer", [*line(run, reference), *options], capsys)
        assert (status, out) == (2, "")
        assert len(err.strip().splitlines()) == 1, err
        assert message in err
    assert not list(run.glob("samples-*"))
    small = tmp_path / "small"
    small.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(small / "a.png")
    status, _, err = run_here(main, "python -m trainer", line(run, small), capsys)
    assert status == 2
    assert "holds 1 images, and at least 4 are needed" in err
    assert not list(run.glob("samples-*"))


def test_the_store_is_the_reference_unless_one_is_named(run: Path, here: list[list[str]]) -> None:
    """The micro store has no originals, which is said before anything is drawn."""
    config = ScoreConfig(run=run, n=N, encoder="tiny-vit", vae=str(TINY_VAE), device="cpu")
    with pytest.raises(SystemExit):
        score(config)
    (asked,) = here
    assert asked[4:6][1].endswith("store")
    assert not list(run.glob("samples-*"))
    with pytest.raises(UserError, match="is not a run"):
        score(ScoreConfig(run=run.parent, n=N))


@pytest.mark.timeout(900)
@pytest.mark.slow  # in default: a second call only prints; generate and features go on from what is there
def test_kills_at_any_moment_cost_nothing_and_leave_one_line(run: Path, reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", *line(run, reference)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def images() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for folder in run.glob("samples-*[!n]") for p in folder.glob("0*.png")}

    def kill_when(reached: Any) -> None:
        process = start()
        deadline_s = time.monotonic() + 200
        while not reached():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    kill_when(lambda: any(n_written(folder) for folder in run.glob("samples-*") if folder.is_dir()))
    first = images()
    assert 0 < len(first) <= N
    kill_when(lambda: list(run.glob("samples-*-evaluation/*.npz")))
    done = start()
    out, err = done.communicate(timeout=250)
    assert done.returncode == 0, err
    assert {name: images()[name] for name in first} == first, "an image that was there was drawn again"
    (recorded,) = read_record(run)
    assert recorded.card.n_images == N
    (result,) = run.glob("samples-*-evaluation/tiny-vit.json")
    assert json.loads(result.read_text())["metrics"]["fd"]["value"] == recorded.metrics["fd"].value
    assert "card:" in out
    assert (run / "report.html").is_file()
