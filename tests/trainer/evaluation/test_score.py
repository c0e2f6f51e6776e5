"""`score`: from a run to its numbers, once; what it lacks is said before anything is drawn; and after kills."""

from __future__ import annotations

import hashlib
import json
import os
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
from safetensors.numpy import load_file, save_file

from pipeline.__main__ import main as describe
from pipeline.encoders.tiny import TINY_VAE, TINY_VIT
from storage.base.console import run_command
from storage.base.errors import UserError
from tests.commands import run_here
from trainer.__main__ import main
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.options import ScoreConfig
from trainer.evaluation.quality.asked import asked_for, is_what_was_asked, stamp
from trainer.evaluation.quality.card import Card, card_in
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


def test_a_result_of_other_weights_or_of_another_reference_is_measured_again(
    run: Path, reference: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def scored(*more: str) -> tuple[float, Card, int]:
        """The distance that is printed last, its card, and how often images were described for it."""
        before = len([line for line in here if "--check" not in line])
        status, out, err = run_here(main, "python -m trainer", line(run, reference, "--no-report", *more), capsys)
        assert status == 0, err
        (file,) = run.glob("samples-*-evaluation/tiny-vit.json")
        result = json.loads(file.read_text())
        value = result["metrics"]["fd"]["value"]
        assert f"{value:.4f}" in out
        return value, card_in(result), len([line for line in here if "--check" not in line]) - before

    def weights(path: Path, factor: float) -> str:
        tensors = {
            name: array * np.float32(factor) for name, array in load_file(TINY_VIT / "model.safetensors").items()
        }
        save_file(tensors, path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    own, card, described = scored()
    assert described == 1
    assert scored() == (own, card, 0)
    sha256 = weights(tmp_path / "other.safetensors", 1.5)
    of_others, its_card, described = scored("--weights", str(tmp_path / "other.safetensors"))
    assert (its_card.extractor_sha256, described) == (sha256, 1)
    assert of_others != own
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "copy.safetensors")
    assert scored("--weights", str(tmp_path / "copy.safetensors")) == (of_others, its_card, 0)
    sha256 = weights(tmp_path / "other.safetensors", 0.5)
    replaced, its_card, described = scored("--weights", str(tmp_path / "other.safetensors"))
    assert (its_card.extractor_sha256, described) == (sha256, 1)
    assert replaced != of_others
    assert scored() == (own, card, 1)
    Image.fromarray(np.zeros((128, 128, 3), dtype=np.uint8)).save(reference / "3.png")
    another, its_card, described = scored()
    assert described == 1
    assert its_card.reference_sha256 != card.reference_sha256
    assert another != own
    assert scored("--resamples", "20")[2] == 1
    assert scored("--resamples", "20")[2] == 0
    shutil.rmtree(reference)
    assert scored("--resamples", "20")[2] == 0


def test_what_is_gone_was_not_replaced_and_what_was_replaced_is_noticed(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.npz", tmp_path / "images" / "deep"
    file.write_bytes(b"1")
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"1")
    (folder / "loop").symlink_to(folder.parent)
    weights = hashlib.sha256(b"1").hexdigest()
    card = Card(reference_sha256="s", extractor_sha256=weights)

    def asked(reference: Path) -> dict[str, Any]:
        return asked_for(reference, file, n_reference=0, resamples=0)

    before, of_folder = asked(file), asked(folder.parent)
    assert is_what_was_asked(before, asked(file), card, file, lambda: None)
    for path, now in ((file, before), (folder / "0.png", of_folder)):
        reference = file if path == file else folder.parent
        times = path.stat()
        time.sleep(0.02)  # file systems' clocks are coarse
        path.write_bytes(b"1")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert asked(reference)["reference_stamp"] != now["reference_stamp"], "of equal size and time of writing"
        assert not is_what_was_asked(now, asked(reference), card, file, lambda: None)
        assert is_what_was_asked(now, asked(reference), card, file, lambda: "s"), "the same statistics, and weights"
        assert not is_what_was_asked(now, asked(reference), card, file, lambda: "others")
    assert not is_what_was_asked(before, asked(file), Card(reference_sha256="s"), file, lambda: "s"), "other weights"
    file.unlink()
    assert is_what_was_asked(before, asked(file), card, file, lambda: None)
    old = {"reference": str(file), "n_reference": 0}
    assert not is_what_was_asked(old, asked(file), card, file, lambda: "s"), "nothing says with how many draws"


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


def test_a_stamp_is_of_what_lies_there_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(b"a")
    (tmp_path / "f.npz").write_bytes(b"f")
    monkeypatch.chdir(tmp_path)
    for name in ("d", "f.npz"):
        assert stamp(name) == stamp(tmp_path / name) == stamp(f"./d/../{name}")
    before = stamp("d")
    (tmp_path / "d" / "a.png").rename(tmp_path / "d" / "b.png")
    assert stamp("d") != before
