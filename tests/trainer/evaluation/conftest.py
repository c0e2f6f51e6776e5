"""Runs for tests that only read them: a micro model with three checkpoints, and folders of runs for the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.evaluation.report_runs import draw, evaluate, evaluation, make_run
from trainer.config.command_line import train_config
from trainer.evaluation.generate.decode import write_grid
from trainer.evaluation.report.page import write_report
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.loop.train import train

CARD = {
    "run": "r",
    "labels": "balanced",
    "sampler": "euler-maruyama",
    "calls": 250,
    "guidance_high": 0.7,
    "rounding": "round",
    "n_images": 512,
    "departures": [],
}
MICRO = {  # as on the command line
    "preset": "sit-tiny-2",
    "device": "cpu",
    "batch": "8",
    "steps": "3",
    "ema_decay": "0.5",
    "model.depth": "3",
    "model.width": "32",
    "model.heads": "2",
    "model.align_block": "1",
    "model.projector_width": "32",
    "log.tensorboard": "false",
    "checkpoint.every": "1",
    "checkpoint.keep": "9",
}


@pytest.fixture(scope="session")
def micro_run(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned run of three blocks and three steps, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("runs") / "micro"
    train(train_config({**MICRO, "store": str(shared_tiny_store), "run": str(run)}))
    return run


@pytest.fixture(scope="module")
def runs(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten runs, of which one has no alignment and one was not measured."""
    folder = tmp_path_factory.mktemp("study")
    for seed in range(10):
        make_run(folder, shared_tiny_store, seed, 0.0 if seed == 3 else 0.5, measured=seed != 4)
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    """The page."""
    (out,) = write_report([runs], runs / "report.html", "A study with <angle brackets> & more")
    return out


@pytest.fixture(scope="module")
def study(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs that differ in much: two methods of two seeds, and a mixed one with a very long name and path."""
    folder = tmp_path_factory.mktemp("mixed-study")
    for weight, name in ((0.5, "repa"), (0.0, "vanilla")):
        for seed in (0, 1):
            run = make_run(folder, shared_tiny_store, seed, weight, measured=True, name=f"{name}-seed{seed}")
            fid = {"value": 20.0 + seed / 10 + 9 * (not weight), "n_generated": 512, "n_reference": 1152}
            (run / "evaluations.jsonl").write_text(json.dumps(evaluation(0, metrics={"fid": fid}, card=CARD)) + "\n")
            draw(run)
    long = "irepa-with-" + "a-very-long-name-" * 5 + "and_unbreakablewordsthatgoonandon"
    mixed = make_run(folder, shared_tiny_store, 7, 0.25, measured=True, name=long)
    names = ("fid", "sfid", "fd", "kid", "cmmd", "inception_score", "precision", "recall", "density", "coverage")
    metrics = {n: {"value": 12.345, "n_generated": 512, "n_reference": 1152, "interval": [11.9, 12.8]} for n in names}
    evaluate(mixed, 1.0, metrics=metrics, card={**CARD, "labels": "random", "reference": "/a/long/" + "path" * 30})
    text = (mixed / "config.yaml").read_text()
    for name, value in (("lr", "0.0003"), ("batch", "16"), ("depth", "5"), ("heads", "2"), ("label_dropout", "0.25")):
        text = re.sub(rf"(?m)^(\s*{name}: ).*$", rf"\g<1>{value}", text)
    (mixed / "config.yaml").write_text(text)
    draw(mixed)
    write_grid(np.full((16, 64, 64, 3), 99, dtype=np.uint8), folder / "features.png", columns=8)
    return folder


WEIGHTS = {"repa": 0.5, "vanilla": 0.0, "half": 0.25}


@pytest.fixture
def make(shared_tiny_store: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A folder of runs, a run a value of FID, by method; None is not evaluated."""

    def runs(of: dict[str, list[float | None]]) -> list[RunRecord]:
        for name, values in of.items():
            for seed, value in enumerate(values):
                run = make_run(
                    tmp_path, shared_tiny_store, seed, WEIGHTS[name], measured=False, name=f"{name}-seed{seed}"
                )
                if value is not None:
                    evaluate(run, value)
        return read_runs([tmp_path])

    return runs
