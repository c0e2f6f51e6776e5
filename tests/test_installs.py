"""A plain install reads stores, [train] trains from them; what an install lacks is named in one line.

The quick tests hide what an extra does not bring from a fresh process; the slow ones make the environments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from storage.base.extras import EXTRAS_OF, MODULES, package_of
from tests.installs import NAME, REPOSITORY, python, requirements, without_others
from tests.stores import FEATURES, LATENTS
from tests.trainer.runs import command

READ = """
import sys
from storage.batches import iterate_batches

for batch in iterate_batches(sys.argv[1], {groups!r}, batch=8, seed=0, stop=2):
    print(*sorted(batch), len(batch["row"]))
""".format(groups=[LATENTS, FEATURES])  # noqa: UP032 — the code has braces of its own


IN_TURN = """
import json, sys
from {package}.__main__ import main

for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
    print("----")
    print("----", file=sys.stderr)
"""


def in_turn(package: str, commands: list[list[str]], env: dict[str, str], program: str) -> list[tuple[str, str]]:
    """Run commands of a package in one process, whose start takes longer than they do; output and errors of each."""
    done = python("-c", IN_TURN.format(package=package), json.dumps(commands), env=env, program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(zip(*(text.split("----\n")[:-1] for text in (done.stdout, done.stderr)), strict=True))


def read_verify_diff(store: Path, env: dict[str, str], program: str = sys.executable) -> None:
    """What a plain install is for."""
    where = str(store)
    in_turn(
        "storage", [["verify", where, "--deep"], ["diff", where, where], ["ls", where], ["info", where]], env, program
    )
    done = python("-c", READ, where, env=env, program=program)
    assert done.stdout.count(f"{FEATURES}/patches") == 2, done.stderr


def train_and_resume(store: Path, run: Path, env: dict[str, str], program: str = sys.executable) -> None:
    """What [train] is for: some steps with checkpoints, grids of samples and TensorBoard, and some more."""
    fixed = {
        "checkpoint.every": 2,
        "log.samples": 2,
        "log.samples_every": 2,
        "sample.steps": 2,
        "log.tensorboard": True,
    }
    commands = [command(store, run, steps=steps, **fixed)[3:] for steps in (2, 4)]
    for steps, (out, err) in zip((2, 4), in_turn("trainer", commands, env, program), strict=True):
        assert f"{steps - 2}/{steps} [00:00<?" in err  # where the bar begins
        assert re.search(rf"^steps +{steps}; 2 now", out, re.MULTILINE)
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("extra", MODULES)
def test_what_is_named_to_the_user_is_what_the_extra_brings(extra: str) -> None:
    assert {package_of(module) for module in MODULES[extra].split()} == {
        needed.name for needed in requirements(extra) if needed.name != NAME
    }
    assert any(extra in extras for extras in EXTRAS_OF.values())


def test_a_plain_install_reads_verifies_and_compares(shared_tiny_store: Path, tmp_path: Path) -> None:
    env = without_others("", tmp_path / "site")
    assert python("-c", "import torch", env=env).returncode == 1
    read_verify_diff(shared_tiny_store, env)


@pytest.mark.slow
def test_train_alone_trains_and_resumes(shared_tiny_store: Path, tmp_path: Path) -> None:
    env = without_others("train", tmp_path / "site")
    assert python("-c", "import diffusers", env=env).returncode == 1
    train_and_resume(shared_tiny_store, tmp_path / "run", env)


@pytest.mark.parametrize(
    ("extra", "command_line", "needed"),
    [
        ("", "storage export STORE --to hdf5 --out OUT", "h5py; pip install '.[precompute]' in this project's folder"),
        pytest.param(
            "",
            "storage import HERE --from lightningdit --store OUT --name a",
            "safetensors; pip install",
            marks=pytest.mark.slow,
        ),
        ("", "trainer train --store STORE", "torch; pip install '.[train]' in this project's folder"),
        ("", "pipeline index HERE", "; pip install '.[precompute]' in this project's folder"),
        (
            "train",
            "pipeline precompute --data HERE --store OUT",
            "; pip install '.[precompute]' in this project's folder",
        ),
        pytest.param(
            "train",
            "pipeline preview STORE --out OUT",
            "; pip install '.[precompute]' in this project's folder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    extra: str, command_line: str, needed: str, shared_tiny_store: Path, tmp_path: Path
) -> None:
    places = {"STORE": shared_tiny_store, "HERE": tmp_path, "OUT": tmp_path / "out"}
    arguments = [str(places.get(word, word)) for word in command_line.split()]
    done = python("-m", *arguments, env=without_others(extra, tmp_path / "site"))
    *progress, line = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert line.startswith(f"python -m {arguments[0]} {arguments[1]}: error: this needs the package ")
    assert needed in line
    assert "Traceback" not in "".join(progress)


@pytest.mark.parametrize("package", ["storage", "pipeline", "trainer"])
def test_help_needs_nothing_more(package: str, tmp_path: Path) -> None:
    done = python("-m", package, "--help", env=without_others("", tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extra", ["", "train"])
def test_a_fresh_environment(extra: str, shared_tiny_store: Path, tmp_path: Path) -> None:
    """pip takes minutes for torch; where no index of packages can be reached, the test is skipped."""
    venv.create(tmp_path / "venv", with_pip=True)
    program = str(tmp_path / "venv/bin/python")
    what = f"{REPOSITORY}[{extra}]" if extra else str(REPOSITORY)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    constraints = str(REPOSITORY / "constraints.txt")
    pip = [program, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, what]
    done = subprocess.run(pip, capture_output=True, text=True, env=env, cwd=tmp_path)
    if "Retrying" in done.stderr:
        pytest.skip("the environments cannot be made: no index of packages can be reached from here")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads(python("-m", "pip", "list", "--format", "json", env=env, program=program).stdout)
    size = subprocess.run(["du", "-sm", tmp_path / "venv"], capture_output=True, text=True).stdout.split()[0]
    print(f"[{extra}]: {len(listed)} packages, {size} MB")
    names = {package["name"].lower() for package in listed}
    assert not names & {"ray", "diffusers", "h5py", "torch-fidelity", "torch_fidelity", "scikit-learn", "matplotlib"}
    if extra:
        train_and_resume(shared_tiny_store, tmp_path / "run", env, program)
    else:
        read_verify_diff(shared_tiny_store, env, program)
