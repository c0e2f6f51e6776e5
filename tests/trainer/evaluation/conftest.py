"""A run of a micro model with three checkpoints, trained once for the tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.command_line import train_config
from trainer.loop.train import train

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
