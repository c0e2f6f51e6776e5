"""The trainer on a Ray cluster: the same ranks as torchrun's, with the same losses; mistakes are one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import assert_same_run, command, curve, micro, start, start_ranks
from trainer.loop.train import train


def launch(tmp_path: Path, trainer: list[str], workers: int = 2) -> tuple[int, str, str]:
    """The exit status and what was printed."""
    options = ["--workers", str(workers), "--scratch", str(tmp_path / "ray"), "--ray-address", ""]
    process = start([sys.executable, "-m", "pipeline", "launch", *options, "--", *trainer], RAY_ADDRESS="")
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.slow  # in default: the same ranks through torchrun, in test_makefile.py
def test_two_workers_train_as_one_process(shared_tiny_store: Path, tmp_path: Path) -> None:
    train(micro(shared_tiny_store, tmp_path / "one", steps=3))
    status, out, err = launch(tmp_path, command(shared_tiny_store, tmp_path / "workers", steps=3)[3:])
    assert status == 0, out + err
    assert "2 rank(s) of 4 images, ddp" in out + err
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "workers"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_ray_s_workers_are_torchrun_s_ranks_bit_for_bit(shared_tiny_store: Path, tmp_path: Path) -> None:
    ranks = start_ranks(command(shared_tiny_store, tmp_path / "ranks"))
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    status, out, err = launch(tmp_path, command(shared_tiny_store, tmp_path / "workers")[3:])
    assert status == 0, out + err
    assert_same_run(tmp_path / "ranks", tmp_path / "workers")


@pytest.mark.slow
def test_a_rank_s_mistake_is_one_line_here(tmp_path: Path) -> None:
    status, out, err = launch(tmp_path, command(tmp_path / "nowhere", tmp_path / "run")[3:])
    assert status == 2, out + err
    assert err.splitlines()[-1].startswith("python -m pipeline launch: error:")
    assert "nowhere does not exist" in err.splitlines()[-1]


@pytest.mark.slow
def test_more_workers_than_the_machine_has_cores_are_refused(tmp_path: Path) -> None:
    status, _, err = launch(tmp_path, ["train"], workers=1000)
    assert status == 2
    assert "1000 workers need 1000 CPUs and the cluster has" in err


def test_nothing_to_launch_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pipeline", "launch"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nothing to launch; end the command with -- train" in done.stderr
