"""Checkpoints: what comes back is what was saved, a crash leaves the one before, another version is refused."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from storage.base.errors import UserError
from trainer.config.optim import OptimConfig
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.loop.ema import EMA
from trainer.loop.optimiser import make_optimizer, optimizer_tensors
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.run import checkpoint
from trainer.run.checkpoint import RunState, latest_checkpoint, load_ema_weights, read_state, restore, save_checkpoint
from trainer.run.metrics import MetricsLog, read_metrics


class Parts(NamedTuple):
    model: DiffusionTransformer
    ema: EMA
    optimizer: torch.optim.AdamW


def make_parts(seed: int, width: int = 16, steps: int = 2) -> Parts:
    """A small model after some steps, so that moments and averages differ from zero and from the weights."""
    torch.manual_seed(seed)
    geometry = Geometry(
        kind="sit",
        input_size=4,
        channels=2,
        patch=2,
        width=width,
        depth=1,
        heads=2,
        n_classes=3,
        targets=((1, 5),),
        projector_width=8,
    )
    model = DiffusionTransformer(geometry)
    parts = Parts(model, EMA(model, 0.5), make_optimizer(model, OptimConfig(lr=1e-2)))
    for _ in range(steps):
        velocity, projections = model(torch.randn(3, 2, 4, 4), torch.rand(3), torch.arange(3))
        ((velocity - 1).square().sum() + projections[0].square().sum()).backward()
        parts.optimizer.step()
        parts.ema.update(model)
    return parts


def all_tensors(parts: Parts) -> dict[str, Tensor]:
    named = {
        "model": parts.model.state_dict(),
        "ema": parts.ema.state_dict(),
        "optimizer": optimizer_tensors(parts.model, parts.optimizer),
    }
    return {f"{kind} {name}": tensor.clone() for kind, state in named.items() for name, tensor in state.items()}


def state_at(step: int) -> RunState:
    return RunState(
        step=step,
        config={"batch": 8},
        identities={"latents/a": "0"},
        log_sums=[0.1, 0.2],
        log_count=1,
        skipped=3,
        scaler={"scale": 8.0},
    )


def save(run: Path, step: int, parts: Parts, keep: int = 2, milestone_every: int = 0) -> Path:
    return save_checkpoint(run, state_at(step), *parts, keep, milestone_every=milestone_every)


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    saved, other = make_parts(0), make_parts(1, steps=0)
    path = save(tmp_path, 7, saved)
    assert latest_checkpoint(tmp_path) == path
    assert read_state(path) == state_at(7)
    restore(path, *other)
    want, got = all_tensors(saved), all_tensors(other)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert any(name.endswith(".exp_avg_sq") for name in want)
    averaged = load_ema_weights(path)
    assert all(torch.equal(averaged[name], tensor) for name, tensor in saved.ema.state_dict().items())


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    path = save(tmp_path, 7, make_parts(0))
    assert path.name == "step-0000007"
    names = sorted(file.name for file in path.iterdir())
    assert names == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert set(load_file(path / "model.safetensors")) == set(make_parts(0).model.state_dict())


def test_only_the_newest_stay(tmp_path: Path) -> None:
    parts = make_parts(0)
    for step in (10, 20, 30, 100):
        save(tmp_path, step, parts)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000030", "step-0000100"]
    assert (tmp_path / "latest").read_text() == "step-0000100"


@pytest.mark.parametrize("call", ["save_file", "fsync_directory", "publish", "write_atomic"])
def test_a_crash_at_any_point_leaves_a_whole_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    parts = make_parts(0)
    first = save(tmp_path, 1, parts)

    def crash(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, crash)
        with pytest.raises(UserError, match=r"step 2 could not be saved in .*No space.*free some space"):
            save(tmp_path, 2, parts)
    assert latest_checkpoint(tmp_path) == first
    restore(first, *make_parts(1, steps=0))
    second = save(tmp_path, 2, parts)  # over whatever the crash left
    assert latest_checkpoint(tmp_path) == second
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_milestones_stay_too(tmp_path: Path) -> None:
    parts = make_parts(0)
    for step in range(10, 90, 10):
        save(tmp_path, step, parts, keep=2, milestone_every=30)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000030", "step-0000060", "step-0000070", "step-0000080"]


def test_a_rank_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(1), *make_parts(0), 2, writes=False)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_that_latest_names_is_never_removed(tmp_path: Path) -> None:
    """A crash between the renaming and `latest`, then a shorter interval: older steps are saved beside a newer one."""
    parts = make_parts(0)
    for step in (100, 200, 300):
        save(tmp_path, step, parts, keep=1)
    save(tmp_path, 200, parts, keep=2)
    (tmp_path / "latest").write_text("step-0000200")  # as the crash leaves it; step 300 is there too
    path = save(tmp_path, 210, parts, keep=1)
    assert latest_checkpoint(tmp_path) == path


def test_unknown_versions_and_missing_ones_are_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    path = save(tmp_path, 7, make_parts(0))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(UserError, match="version 99, this code reads 2"):
        read_state(path)
    (tmp_path / "latest").write_text("step-0000008")
    with pytest.raises(UserError, match="names step-0000008, which is not in"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7, make_parts(0))
    with pytest.raises(UserError, match="is of another model"):
        restore(path, *make_parts(0, width=32, steps=0))


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 7, make_parts(0))
    os.truncate(path / f"{name}.safetensors", 100)
    with pytest.raises(UserError, match="step-0000007"):
        restore(path, *make_parts(1, steps=0))


def test_wandb_is_imported_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in: the package is no dependency. The same folder goes on with the same run."""
    config = override(preset("sit-tiny-2"), {"run": tmp_path / "r", "log.tensorboard": False, "log.wandb": "repa"})
    config.run.mkdir()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--log\.wandb needs the package wandb; pip install wandb"):
        MetricsLog(config, from_step=0)
    began: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((values, step))

        def finish(self) -> None:
            logged.append(({}, -1))

    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **options: began.append(options) or Run()  # type: ignore[attr-defined]
    stand_in.Image = str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):
        log = MetricsLog(config, from_step=0)
        log.write({"step": 4, "loss": 0.5, "loss_by_time": [1.0, None, 3.0], "gradient_norm": None})
        log.picture(tmp_path / "grid.png", None, 5)
        log.close()
    assert began[0] == began[1]
    assert (began[0]["project"], began[0]["resume"], began[0]["config"]["batch"]) == ("repa", "allow", 32)
    assert logged[:3] == [
        ({"loss": 0.5, "loss_by_time/0": 1.0, "loss_by_time/2": 3.0}, 4),
        ({"samples": str(tmp_path / "grid.png")}, 5),
        ({}, -1),
    ]


def test_metrics_after_a_resume_hold_each_step_once(tmp_path: Path) -> None:
    config = override(preset("sit-tiny-2"), {"run": tmp_path, "log.tensorboard": False})
    log = MetricsLog(config, from_step=0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 0.1 * step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    log = MetricsLog(override(config, {"log.tensorboard": True}), from_step=2)
    log.write({"step": 3, "loss": 7.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert list((tmp_path / "tensorboard").glob("events.*"))
