"""Whatever is written has the mode of a file that the user makes: stores, runs, checkpoints, exports, measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.encoders.tiny import TINY_VAE
from pipeline.features import FeaturesConfig, Job, write_features
from storage.exchange import EXPORTS, export_store
from tests.slow import slow_but
from tests.stores import LATENTS, make_store
from tests.trainer.evaluation.conftest import MICRO
from trainer.config.command_line import train_config
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.probing.analyse import write_measure
from trainer.evaluation.probing.sweep import SweepConfig
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.report.page import write_report
from trainer.loop.train import train


@pytest.fixture(params=slow_but([0o022, 0o002, 0o077], [0o002]), ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The user's umask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[bool, set[str]]:
    """Modes of the folders (True) and of the files below a folder."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for path in folder.rglob("*"):
        found[path.is_dir()].add(oct(path.stat().st_mode & 0o777))
    return found


def test_everything_follows_the_umask(mask: int, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    store, run = tmp_path / "store", tmp_path / "runs" / "micro"
    make_store(store)
    for name in EXPORTS:
        if name != "mds":  # another package's writer, in a process of its own
            export_store(store, name, tmp_path / f"exported-{name}", groups=[LATENTS])
    options = {**MICRO, "steps": "1", "checkpoint.every": "1", "log.samples_every": "1", "log.samples": "2"}
    train(train_config({**options, "store": str(store), "run": str(run)}))
    for to in ("safetensors", "diffusers"):
        export(run, to, None, "latest")
    generate(GenerateConfig(run=run, n=2, batch=2, steps=2, format="npz", vae=str(TINY_VAE), device="cpu"))
    write_measure(run, SweepConfig(k=5, device="cpu", blocks="1"), "cknna", None)
    np.savez(tmp_path / "images.npz", np.zeros((4, 128, 128, 3), np.uint8))
    for name in ("a", "b"):
        job = Job(where=tmp_path / "images.npz", out=tmp_path / f"{name}.npz")
        write_features([job], FeaturesConfig(encoder="tiny-vit", device="cpu"))
    evaluate(tmp_path / "a.npz", tmp_path / "b.npz", Description(encoder="tiny-vit"), run=run, step=1)
    write_report([run], run / "report.html", "")
    assert (run / "evaluations.jsonl").is_file()
    assert modes(tmp_path) == {True: {oct(0o777 & ~mask)}, False: {oct(0o666 & ~mask)}}
