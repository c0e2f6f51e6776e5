"""The Makefile's own work: what it hands to the commands behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with the environment that runs the tests, which it must not remake."""
    venv = Path(sys.prefix)
    line = ["make", "-o", f"{venv}/.installed", f"VENV={venv}", *arguments]
    # `make test` is itself a make: its variables would make this one a sub-make, which announces itself.
    # Those of its command line (`ARGS=-x`) would be this one's too.
    inherited = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_train_on_two_ranks_through_torchrun(shared_tiny_store: Path, tmp_path: Path) -> None:
    options = "--device cpu --steps 2 --batch 4 --log.every 1 --log.tensorboard false --model.depth 2 --model.width 32"
    run = tmp_path / "run"
    done = make("train", f"STORE={shared_tiny_store}", "PRESET=sit-tiny-2", f"RUN={run}", "GPUS=2", f"ARGS={options}")
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) of 2 images" in done.stdout
    assert (run / "latest").read_text() == "step-0000002"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "python -m trainer train --store '/s' --preset sit-xl-2 --run '/r' --seed 1"),
        (["GPUS=8"], "torchrun --standalone --nproc-per-node 8 -m -- trainer train --store '/s'"),
        (["GPUS=16", "RAY_ADDRESS=auto"], "python -m pipeline launch --workers 16 -- train --store '/s'"),
    ],
)
def test_train_is_the_command_that_fits_the_machines(arguments: list[str], command: str) -> None:
    shown = make("--dry-run", "train", "STORE=/s", "RUN=/r", "ARGS=--seed 1", "RAY_ADDRESS=", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert command in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["precompute", "DATA=/somewhere"], "STORE is empty"),
        (["train", "STORE=/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["train", "STORE=/nowhere", "PRESET=sit-xxl-2"], "unknown preset 'sit-xxl-2'"),
    ],
)
def test_a_mistake_ends_make_with_one_line_of_ours(arguments: list[str], message: str) -> None:
    done = make(*arguments)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(ours) == 1, done.stderr
    assert message in ours[0]


def test_help_names_every_target() -> None:
    printed = make("help").stdout
    for target in (
        *("demo", "precompute", "train", "generate", "evaluate", "analyse", "ablate", "report", "export"),
        *("test", "test-all", "lint", "env"),
    ):
        assert f"\n{target} " in f"\n{printed}"
