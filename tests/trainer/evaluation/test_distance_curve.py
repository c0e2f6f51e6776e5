"""`--log.distance-every`: a curve that training does not feel, that no resume or rank changes, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.__main__ import main as describe
from pipeline.encoders.tiny import TINY_VAE
from storage.base.console import Stop, run_command
from storage.base.errors import UserError
from storage.feature_file import open_feature_file, write_feature_file
from tests.trainer.evaluation.report_runs import make_run
from tests.trainer.runs import assert_same_run, micro, train_on_ranks
from trainer.config.tree import override
from trainer.evaluation import distance_curve
from trainer.evaluation.distance_curve import DistanceCurve
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.report.curves import figures
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.run_record import read_runs
from trainer.loop.train import train
from trainer.ranks.world import World
from trainer.run.metrics import _scalars, read_metrics
from trainer.run.opened import checkpoints_of, load_model, open_run

N = 6


def described(command: list[str]) -> tuple[int, str]:
    """Status and errors of the command that describes images, in this process: a new one takes seconds to import."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        run_command(describe, "python -m pipeline", command[3:])
    assert isinstance(end.value.code, int)
    return end.value.code, said.getvalue()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Images are described in this process; the command lines that did."""
    lines: list[list[str]] = []

    def run(command: list[str], started: Callable[..., object] = id) -> None:
        lines.append(command)
        status, said = described(command)
        if status:
            raise UserError(said.strip().splitlines()[-1].partition(": error: ")[2])

    monkeypatch.setattr(distance_curve, "_run", run)
    return lines


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 20 pictures."""
    folder = tmp_path_factory.mktemp("reference")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", arr_0=pictures)
    line = ["", "", "", "features", str(folder / "pictures.npz"), "--out", str(folder / "features.npz")]
    status, said = described([*line, "--encoder=tiny-vit", "--device=cpu"])
    assert status == 0, said
    return folder / "features.npz"


@pytest.fixture
def options(reference: Path) -> dict[str, Any]:
    """Settings of a run with a point every two steps."""
    torch.set_num_threads(1)
    return {
        "data.decoder": str(TINY_VAE),
        "sample.steps": 2,
        "checkpoint.every": 2,
        "ema_decay": 0.5,
        "log.distance_every": 2,
        "log.distance_images": N,
        "log.distance_reference": str(reference),
    }


def points(run: Path) -> dict[int, float]:
    """Step and distance of every point in the log; a step that is there twice fails."""
    lines = [line for line in read_metrics(run) if "frechet_distance" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["frechet_distance"] for line in lines}


def test_a_point_is_what_generate_and_evaluate_make_of_the_step(
    shared_tiny_store: Path,
    tmp_path: Path,
    reference: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the other command, in its own process."""
    monkeypatch.setattr(distance_curve._Reference, "require_comparable", lambda *_: None)  # another process
    run = tmp_path / "run"
    train(micro(shared_tiny_store, run, steps=2, **options))
    out, err = capsys.readouterr()
    (value,) = points(run).values()
    assert "distance   every 2 steps, of 6 images in 128 features of tiny-vit, to 20 images of" in out
    assert "far too large (6 images and 20 images of the reference do not determine a covariance), to watch by" in out
    assert f"step 2: Fréchet distance {value:.4f} of 6 images in features of tiny-vit, in " in err
    assert not list(run.glob(".distance-*"))
    folder, *_ = generate(GenerateConfig(run=run, n=N, batch=N, steps=2, device="cpu"))
    monkeypatch.setattr(Description, "describe", lambda self, sets, like: described(self.command(sets, like)))
    result = evaluate(folder, reference, Description(encoder="tiny-vit", device="cpu"), resamples=0)
    assert result["metrics"]["fd"]["value"] == pytest.approx(value, rel=1e-9)
    assert json.loads((run / "summary.json").read_text())["last"]["step"] == 2
    assert "denoising_loss" in json.loads((run / "summary.json").read_text())["last"]


def test_training_does_not_feel_it_and_a_resumed_curve_is_that_of_an_unbroken_run(
    shared_tiny_store: Path, tmp_path: Path, options: dict[str, Any], here: list[list[str]]
) -> None:
    train(micro(shared_tiny_store, tmp_path / "without", **options | {"log.distance_every": 0}))
    assert here == []
    train(micro(shared_tiny_store, tmp_path / "with", **options))
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert list(points(tmp_path / "with")) == [2, 4, 6]
    assert len(set(points(tmp_path / "with").values())) == 3

    broken = tmp_path / "broken"
    train(micro(shared_tiny_store, broken, steps=4, **options))
    log = broken / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert "frechet_distance" in lines[-1]
    log.write_text("".join(lines[:-1]))  # as a kill leaves it that comes while the point of a saved step is measured
    train(micro(shared_tiny_store, broken, **options))
    assert_same_run(tmp_path / "with", broken)
    assert points(broken) == points(tmp_path / "with")
    n_described = len(here)
    train(micro(shared_tiny_store, broken, **options))
    assert len(here) == n_described + 1, "a run that is complete looks whether it could, and describes nothing"


@dataclass(frozen=True, kw_only=True)
class Joined(World):
    """A rank that is a thread; what the ranks say lies in `said`."""

    said: list[Any]
    barrier: threading.Barrier

    def all_said(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait(60)
        everything = list(self.said)
        self.barrier.wait(60)
        return everything

    def max(self, value: float) -> float:
        return max(self.all_said(value))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.all_said(values))


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_images_are_the_same_bits_on_any_number_of_ranks(
    micro_run: Path, options: dict[str, Any], here: list[list[str]], monkeypatch: pytest.MonkeyPatch, n_ranks: int
) -> None:
    """Four blocks, the last one cut; and one rank's signal ends the work of all."""
    monkeypatch.setattr(distance_curve, "BLOCK", 2)
    opened = open_run(micro_run)
    config = override(opened.config, {**options, "log.distance_images": 7})
    model = load_model(opened, checkpoints_of(micro_run)[0], "ema", torch.device("cpu"))
    training = SimpleNamespace(ema=SimpleNamespace(model=model))

    def drawn_on(worlds: Sequence[World], stops: Sequence[Stop]) -> list[tuple[np.ndarray, int, str]]:
        def of_rank(world: World, stop: Stop) -> tuple[np.ndarray, int, str]:
            curve = DistanceCurve(config, opened.data, opened.geometry, opened.scale, world)
            return curve._pictures(training, stop, lambda _: None)  # type: ignore[arg-type]

        with ThreadPoolExecutor(len(worlds)) as pool:
            return list(pool.map(of_rank, worlds, stops))

    def joined(n: int) -> list[World]:
        said, barrier = [None] * n, threading.Barrier(n)
        return [Joined(rank=i, size=n, device=torch.device("cpu"), said=said, barrier=barrier) for i in range(n)]

    ((alone, how, _),) = drawn_on([World(rank=0, size=1, device=torch.device("cpu"))], [Stop()])
    assert how == distance_curve.DONE
    assert alone.shape == (7, 128, 128, 3)
    assert len({image.tobytes() for image in alone}) == 7
    main, *others = drawn_on(joined(n_ranks), [Stop()] * n_ranks)
    assert np.array_equal(main[0], alone)
    assert {how for _, how, _ in (main, *others)} == {distance_curve.DONE}
    assert all(len(pixels) == 0 for pixels, _, _ in others)
    stopped = drawn_on(joined(n_ranks), [*[Stop()] * (n_ranks - 1), Stop(signal=signal.SIGTERM)])
    assert {how for _, how, _ in stopped} == {distance_curve.STOPPED}
    opened.data.close()


@pytest.mark.slow  # in default: the same with threads for ranks
def test_ranks_share_the_images_out(
    shared_tiny_store: Path, tmp_path: Path, options: dict[str, Any], here: list[list[str]]
) -> None:
    """Three blocks on two ranks, the last one cut; weights of ranks differ from one rank's in their last bits."""

    def plan(name: str, **changes: Any) -> dict[str, Any]:
        return {"store": shared_tiny_store, "run": tmp_path / name, "steps": 2, **options, **changes}

    many = {"log.distance_images": 130}
    refused = plan("refused", **{"log.distance_reference": str(tmp_path / "nowhere.npz")})
    main, other = train_on_ranks(2, [plan("two", parallel="fsdp", **many), refused])
    assert main == ["", f"{tmp_path / 'nowhere.npz'} does not exist"]
    assert other == ["", "another rank cannot measure --log.distance-every, and says why"]
    train(micro(**plan("one", **many)))
    assert points(tmp_path / "two") == pytest.approx(points(tmp_path / "one"), rel=1e-3)


def test_what_is_missing_is_said_before_training_starts(
    shared_tiny_store: Path, tmp_path: Path, reference: Path, options: dict[str, Any], here: list[list[str]]
) -> None:
    file = open_feature_file(reference)
    features = file.read("features")

    def variant(out: str, n: int = 20, **changes: Any) -> str:
        identity = replace(file.identity, **changes)
        write_feature_file(tmp_path / out, {"features": features[:n]}, identity, {**file.images, "n": n})
        return str(tmp_path / out)

    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data.decoder": ""}, "does not say what decodes it; pass --data.decoder"),
        ({"data.decoder": str(tmp_path)}, "cannot be loaded .* pass --data.decoder with a diffusers directory"),
        ({"log.distance_reference": str(tmp_path / "none.npz")}, "does not exist"),
        ({"log.distance_reference": str(tmp_path)}, "holds images; make a feature file"),
        ({"log.distance_reference": str(tmp_path / "statistics.npz")}, "holds statistics; make a feature file"),
        ({"log.distance_reference": variant("one.npz", n=1)}, "describes 1 image"),
        (
            {"log.distance_reference": variant("named.npz", name="no-such-encoder")},
            "cannot be compared with: .*no-such",
        ),
        (
            {"log.distance_reference": variant("other.npz", weights_sha256="f" * 64)},
            "samples of 128×128 pixels and .*other.npz would be described differently .weights_sha256",
        ),
        (
            {"log.distance_reference": variant("small.npz", resolution=64)},
            "described differently .*resolution: 128 and 64",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as refused:
            train(micro(shared_tiny_store, tmp_path / "run", **options | changes))
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for changes, message in (
        ({"log.distance_reference": ""}, "--log.distance-every 2 has nothing to compare with; pass --log.distance-ref"),
        ({"log.distance_images": 1}, "--log.distance-images must be at least 2, got 1"),
        ({"log.distance_every": -1}, "--log.distance-every must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            micro(shared_tiny_store, tmp_path / "run", **options | changes)


def test_a_signal_ends_a_measurement_and_the_next_start_makes_up_for_it(
    shared_tiny_store: Path, tmp_path: Path, options: dict[str, Any], here: list[list[str]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kept = {"checkpoint.every": 1000}
    train(micro(shared_tiny_store, tmp_path / "unbroken", **options | kept))
    in_process = distance_curve._run

    def stopped(command: list[str], started: Callable[..., object] = id) -> None:
        if "--check" not in command:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2 * distance_curve.TICK_S)
            raise UserError("the process was killed")
        in_process(command, started)

    with monkeypatch.context() as patched:
        patched.setattr(distance_curve, "_run", stopped)
        train(micro(shared_tiny_store, tmp_path / "run", **options | kept))
    assert "stopped by SIGTERM; step 2 is saved" in capsys.readouterr().out
    assert points(tmp_path / "run") == {}
    train(micro(shared_tiny_store, tmp_path / "run", **options | kept))
    assert points(tmp_path / "run") == points(tmp_path / "unbroken")
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_failure_costs_a_point_and_no_time_counts_as_a_step(
    shared_tiny_store: Path, tmp_path: Path, options: dict[str, Any], here: list[list[str]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    in_process, slept_s = distance_curve._run, 1.5

    def failing(command: list[str], started: Callable[..., object] = id) -> None:
        if "--check" not in command:
            time.sleep(slept_s)
            raise UserError("the GPU is full")
        in_process(command, started)

    monkeypatch.setattr(distance_curve, "_run", failing)
    run = tmp_path / "run"
    summary = train(micro(shared_tiny_store, run, **options))
    assert points(run) == {}
    err = capsys.readouterr().err
    assert [err.count(f"step {step}: no Fréchet distance: the GPU is full") for step in (2, 4, 6)] == [1, 1, 1]
    steps_s = sum(8 / line["images_per_s"] for line in read_metrics(run))
    assert steps_s < summary["seconds"] - 3 * slept_s
    assert 6 / summary["steps_per_s"] < summary["seconds"] - 3 * slept_s + 0.1  # rounded


OF = {"images": 2048, "drawn": "ode in 50 steps", "extractor": "tiny-<vit>", "extractor_sha256": "1", "width": 4096,
      "reference_sha256": "2", "n_reference": 50000}  # fmt: skip


def point(step: int, value: float, **changes: Any) -> dict[str, Any]:
    return {"step": step, "frechet_distance": value, "frechet_seconds": 3.5, "distance_of": {**OF, **changes}}


def test_only_numbers_are_scalars() -> None:
    assert _scalars(point(4, 2.5)) == {"frechet_distance": 2.5, "frechet_seconds": 3.5}


def test_the_report_has_a_curve_for_each_way_of_measuring(shared_tiny_store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_run(tmp_path, shared_tiny_store, seed, 0.5, measured=False)
        lines = [point(100, 30.0 - seed), point(200, 20.0 - seed), point(300, 15.0 - seed)]
        lines += [point(300, 9.0, images=4096, width=512)] * (seed == 0)
        with open(run / "metrics.jsonl", "a") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))
    records = read_runs([tmp_path])
    assert [len(record.lines) for record in records] == [30, 30], "no line of the losses"
    few, more = [each for each in figures(records, methods_of(records)) if "while training" in each.title]
    assert few.title == "Fréchet distance while training (tiny-<vit>)"
    assert few.note.startswith("2,048 images of averaged weights (ode in 50 steps) against 50,000; lower is better")
    assert "2,048 images do not determine a covariance of 4,096 features" in few.note
    assert few.note.endswith("to watch a training by, not to publish")
    logged = few.charts["step", "logged"]
    assert [(list(line.x), list(line.y)) for line in logged.lines] == [
        ([100, 200, 300], [30, 20, 15]),
        ([100, 200, 300], [29, 19, 14]),
    ]
    assert list(few.charts["step", "methods"].lines[0].y) == [29.5, 19.5, 14.5]
    assert more.note.startswith("4,096 images")
    assert "determine" not in more.note
