"""Hidden states: what the blocks compute, whoever asks, in whatever batches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from storage.base.errors import UserError
from trainer.evaluation.probing.hidden_states import noisy_latents, pooled_hidden_states
from trainer.loop import random_keys
from trainer.run.opened import OpenRun, checkpoints_of, load_model, open_run, step_of

CPU = torch.device("cpu")
ROWS = np.array([2, 3, 11, 17, 30, 39])


@pytest.fixture
def run(micro_run: Path) -> Iterator[OpenRun]:
    opened = open_run(micro_run)
    yield opened
    opened.data.close()


@pytest.fixture
def model(run: OpenRun) -> nn.Module:
    """The newest averaged weights, with gates that are open: so early, blocks would pass tokens on unchanged."""
    found = load_model(run, checkpoints_of(run.path)[0], "ema", CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


def states(model: nn.Module, run: OpenRun, rows: np.ndarray = ROWS, t: float = 0.4, **changes: Any) -> dict[int, Any]:
    options = {"blocks": [1, 2, 3], "seed": 0, "batch": 4, "device": CPU, **changes}
    return pooled_hidden_states(model, run, run.data.latents, rows, t, **options)


def test_they_are_what_the_blocks_compute(model: nn.Module, run: OpenRun) -> None:
    moments = np.empty((len(ROWS), *run.data.latents["moments"].row_shape), dtype=np.float16)
    run.data.latents["moments"].read_into(ROWS, 0, moments)
    mean, std = torch.from_numpy(moments).float().chunk(2, dim=1)
    index = torch.from_numpy(ROWS)
    x = (mean + std * random_keys.normal(0, "posterior", 0, index, (4, 16, 16))) * run.scale.scale
    x_t = 0.6 * x + 0.4 * random_keys.normal(0, "noise", 0, index, (4, 16, 16))
    parts: Any = model
    tokens = parts.x_embedder(x_t) + parts.pos_embed
    condition = parts.t_embedder(torch.full((6,), 0.4)) + parts.y_embedder.embedding_table.weight[-1]
    found = states(model, run)
    for number, block in enumerate(parts.blocks, start=1):
        tokens = block(tokens, condition)
        torch.testing.assert_close(found[number], tokens.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], found[3])


def test_a_rows_state_depends_on_the_row_alone(model: nn.Module, run: OpenRun) -> None:
    whole = states(model, run)
    for changes in ({"batch": 1}, {"batch": 100}, {"blocks": [2]}):
        torch.testing.assert_close(states(model, run, **changes)[2], whole[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states(model, run, ROWS[3:])[2], whole[2][3:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states(model, run, seed=1)[2], whole[2], atol=1e-3)
    assert not torch.allclose(states(model, run, t=0.5)[2], whole[2], atol=1e-3)


def test_nothing_stays_hooked(model: nn.Module, run: OpenRun) -> None:
    states(model, run)
    with pytest.raises(RuntimeError, match="no more"):
        states(model, run, progress=lambda n: (_ for _ in ()).throw(RuntimeError("no more")))
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_is_shared_over_times(run: OpenRun) -> None:
    """x_t is linear in t between the same ends."""
    moments = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    at = [noisy_latents(moments, ROWS[:2], t, run, 0)[0] for t in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(at[1], (at[0] + at[2]) / 2, rtol=1e-5, atol=1e-5)


def test_checkpoints_are_chosen_by_step(micro_run: Path, tmp_path: Path) -> None:
    def steps(which: str) -> list[int]:
        return [step_of(path) for path in checkpoints_of(micro_run, which)]

    assert (steps("latest"), steps("all"), steps("2,1")) == ([3], [1, 2, 3], [2, 1])
    for which in ("4", "first", "1,"):
        with pytest.raises(UserError, match=r"has no checkpoint of step .*; it has 1, 2, 3"):
            checkpoints_of(micro_run, which)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoints_of(tmp_path)


def test_averaged_and_raw_weights_differ(run: OpenRun) -> None:
    checkpoint = checkpoints_of(run.path)[0]
    averaged, raw = (load_model(run, checkpoint, weights, CPU) for weights in ("ema", "raw"))
    name = "final_layer.linear.weight"
    assert not torch.equal(averaged.state_dict()[name], raw.state_dict()[name])


def test_what_is_no_run_is_refused(tmp_path: Path, run: OpenRun) -> None:
    with pytest.raises(UserError, match=r"is not a run \(it has no config.yaml\)"):
        open_run(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints_of(run.path)[0], checkpoint)
    (checkpoint / "ema.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded into the model"):
        load_model(run, checkpoint, "ema", CPU)
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded into the model"):
        load_model(run, checkpoint, "ema", CPU)
