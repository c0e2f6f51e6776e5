"""Micro runs: configurations, processes, ranks, and what must be equal between two runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from storage.base.errors import UserError
from storage.base.options import flag_of, spelled
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.loop.non_finite import NonFiniteError
from trainer.loop.train import train
from trainer.run.metrics import read_metrics

MICRO: dict[str, Any] = {
    "device": "cpu",
    "batch": 8,
    "steps": 6,
    "model.depth": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.align_block": (1,),
    "model.projector_width": 32,
    "log.every": 1,
    "log.tensorboard": False,
    "checkpoint.every": 1000,
}


def micro(store: Path, run: Path, **changes: Any) -> TrainConfig:
    return override(preset("sit-tiny-2"), {**MICRO, "store": store, "run": run, **changes})


def command(store: Path, run: Path, **changes: Any) -> list[str]:
    options = {**MICRO, "store": store, "run": run, **changes}
    flags = [f"{flag_of(name)}={spelled(value)}" for name, value in options.items()]
    return [sys.executable, "-m", "trainer", "train", "--preset=sit-tiny-2", *flags]


def start(argv: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def start_ranks(argv: list[str], n: int = 2) -> list[subprocess.Popen[str]]:
    """Every rank of a gloo world on this machine, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    return [start(argv, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(n)]


def train_on_ranks(n: int, runs: list[dict[str, Any]]) -> list[list[str]]:
    """Train runs one after another in one world of `n` ranks; what each rank said of each: "" or the error's text.

    A run is what `micro` takes. One world for many runs, since starting one takes longer than any of them.
    """
    plan = json.dumps([{name: str(v) if isinstance(v, Path) else v for name, v in run.items()} for run in runs])
    ranks = start_ranks([sys.executable, "-m", "tests.trainer.runs", plan], n)
    said = []
    for rank in ranks:
        out, err = rank.communicate(timeout=280)
        assert rank.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    return said


def main(plan: str) -> None:
    """One rank of `train_on_ranks`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = []
    for run in json.loads(plan):
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in run.items()}
        try:
            train(micro(**{**lists, "store": Path(run["store"]), "run": Path(run["run"])}))
            said.append("")
        except (UserError, NonFiniteError) as error:
            said.append(str(error))
    dist.destroy_process_group()
    print(f"\n{json.dumps(said)}")


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """What must be equal bit for bit; the timings in the same lines need not be."""
    fields = ("step", "denoising_loss", "alignment_loss", "gradient_norm")
    return [tuple(line[field] for field in fields) for line in read_metrics(run) if "frechet_distance" not in line]


def weights(run: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / (run / "latest").read_text().strip() / f"{kind}.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    for kind in ("model", "ema", "optimizer"):
        mine, theirs = weights(a, kind), weights(b, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def is_at(run: Path, step: int) -> bool:
    """Whether a run has logged a step, or one after it."""
    return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    def reached() -> bool:
        assert process.poll() is None or is_at(run, step), process.communicate()
        return is_at(run, step)

    wait_until(reached)


if __name__ == "__main__":
    main(sys.argv[1])
