"""The Makefile's own work: what it hands to the commands behind it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.encoders.tiny import TINY_VAE
from pipeline.next_step import train_commands
from tests.stores import make_store

ROOT = Path(__file__).parent.parent
# `make test` is itself a make: its variables would make this one a sub-make, which announces itself.
# Those of its command line (`ARGS=-x`) would be this one's too.
INHERITED = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with the environment that runs the tests, which it must not remake."""
    venv = Path(sys.prefix)
    line = ["make", "-o", f"{venv}/.installed", f"VENV={venv}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
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
        pytest.param(["precompute", "LATENTS=sdxl-vae"], "DATA is empty and STORE is empty", marks=pytest.mark.slow),
        pytest.param(["train", "PRESET=sit-b-2"], "no store was named; pass --store ROOT", marks=pytest.mark.slow),
        (["train", "GPUS=8"], "no store was named; pass --store ROOT (make train STORE=ROOT)"),
        (["evaluate", "IMAGES=/x"], "--reference is empty; name a path (make takes it as REFERENCE=…)"),
        pytest.param(["report"], "arguments are required: RUNS", marks=pytest.mark.slow),
        pytest.param(["ablate"], "FILE is empty; name a path (make takes it as FILE=…)", marks=pytest.mark.slow),
        pytest.param(["train", "STORE=/nowhere/at/all"], "/nowhere/at/all does not exist", marks=pytest.mark.slow),
        (["train", "STORE=/nowhere", "PRESET=sit-xxl-2"], "unknown preset 'sit-xxl-2'"),
    ],
)
def test_a_mistake_ends_make_with_one_line_of_ours(arguments: list[str], message: str) -> None:
    done = make(*arguments)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(ours) == 1, done.stderr
    assert message in ours[0]


@pytest.mark.parametrize(
    ("target", "named"),
    [("train", name) for name in ("PRESET=x", "RUN=/r", "STORE=", "GPUS=8", "RAY_ADDRESS=auto", "ARGS=--steps 3")]
    + [("precompute", name) for name in ("LATENTS=x", "FEATURES=", "RESOLUTION=1", "RAY_ADDRESS=auto", "ARGS=-x")],
)
def test_whatever_is_named_means_the_real_job(target: str, named: str) -> None:
    shown = make("--dry-run", target, named).stdout
    assert f"-m pipeline {target} --data '' --store ''" in shown or f"-m trainer {target} --store ''" in shown
    assert "runs/demo" not in shown


def test_only_a_bare_target_works_on_the_demo_s_data(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {
        "train": "trainer train --store 'runs/demo'/store --preset sit-tiny-2 --run 'runs/demo'/train",
        "precompute": "pipeline demo --out 'runs/demo' --only-precompute",
    }
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # of a shell on a cluster, and no word about the job
    for target, command in bare.items():
        assert make("--dry-run", target).stdout.strip().endswith(f"-m {command}")
        assert "/elsewhere" in make("--dry-run", target, "OUT=/elsewhere").stdout
    monkeypatch.setenv("PRESET", "sit-b-2")
    monkeypatch.setenv("LATENTS", "sdxl-vae")
    for target in bare:
        assert "runs/demo" not in make("--dry-run", target).stdout


ODD = 'a b/it\'s $HOME $(x) `y` "z" #,;é&'


def pasted(line: str) -> subprocess.CompletedProcess[str]:
    """A line in bash, in the repository's root, where `make` and `python` are those of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in INHERITED}
    venv = Path(sys.prefix)
    settings = f'make() {{ command make -o {venv}/.installed VENV={venv} "$@"; }}; PATH={venv}/bin:$PATH; '
    return subprocess.run(
        ["bash", "-c", settings + line],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def next_commands(printed: str) -> list[str]:
    lines = [line.removeprefix("next: ") for line in printed.splitlines() if line.startswith("next: ")]
    return [command for line in lines for command in line.split("   ·   ")]


@pytest.mark.slow
def test_next_commands_can_be_pasted_whatever_the_path(tmp_path: Path) -> None:
    store, run = tmp_path / ODD / "store", tmp_path / ODD / "run"
    make_store(store)
    tiny = "--device cpu --steps 1 --batch 4 --log.tensorboard false --model.depth 2 --model.width 32"
    done = pasted(f"{train_commands(str(store))[-1]} RUN={shlex.quote(str(run))} ARGS='{tiny}'")
    assert done.returncode == 0, done.stderr
    assert (run / "latest").read_text() == "step-0000001"
    generate, board = next_commands(done.stdout)
    assert shlex.split(board) == ["tensorboard", "--logdir", str(run)]
    done = pasted(f"{generate} --n 1 --device cpu --vae {shlex.quote(str(TINY_VAE))}")
    assert done.returncode == 0, done.stderr
    assert shlex.split(generate) == ["python", "-m", "trainer", "generate", str(run), "--n", "64"]
    done = pasted(f"make --dry-run export RUN={shlex.quote(str(run))}")
    assert shlex.split(done.stdout)[-2:] == ["export", str(run)]


def test_score_hands_over_what_is_named_and_no_more() -> None:
    shown = make("--dry-run", "score", "RUN=a b").stdout
    assert shlex.split(shown)[1:] == [
        *("-m", "trainer", "score", "a b", "--n", "50000", "--encoder", "inception"),
    ]
    shown = make("--dry-run", "score", "RUN=r", "PROTOCOL=repa", "REFERENCE=/x y.npz", "N=8", "GPUS=2", "ARGS=--seed 1")
    assert shlex.split(shown.stdout)[1:] == [
        *("--standalone", "--nproc-per-node", "2", "-m", "--", "trainer", "score", "r", "--n", "8"),
        *("--encoder", "inception", "--protocol", "repa", "--reference", "/x y.npz", "--seed", "1"),
    ]


def test_help_names_every_target() -> None:
    printed = make("help").stdout
    for target in (
        *("demo", "precompute", "train", "generate", "evaluate", "score", "analyse", "ablate", "report", "export"),
        *("test", "test-all", "lint", "env"),
    ):
        assert f"\n{target} " in f"\n{printed}"
