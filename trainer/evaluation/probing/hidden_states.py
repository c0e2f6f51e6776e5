"""What a trained model computes inside: each block's output, averaged over patches, for noisy latents of chosen rows.

As REPA's analysis was made (arXiv 2410.06940, figures 2 and 3, and its authors' answers to questions about them): no
class label is given, so that none can leak, and a sample's tokens are averaged into one vector. Latents are drawn from
the stored posteriors and noised at one time t; draws are keyed by (seed, purpose, row), so a row's noise is the same in
every run, checkpoint, time and batch size.

Hidden states are collected by forward hooks; the model's code knows nothing of it. Memory: rows × blocks × width
float32 for one t, 1.3 GB for 10,000 rows of SiT-XL's 28 blocks.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from storage import GroupReader
from storage.base.boundary import open_regular
from storage.base.errors import StoreError, UserError
from trainer.config.schema import TrainConfig
from trainer.config.tree import from_yaml
from trainer.data.groups import TrainingData, geometry_of, open_data
from trainer.data.loader import Batch
from trainer.evaluation.options import Weights
from trainer.loop import random_keys
from trainer.loop.losses import LatentScale, sample_latents
from trainer.models.make import make_model
from trainer.models.transformer import Geometry
from trainer.objectives import OBJECTIVES
from trainer.ranks.arithmetic import model_arithmetic
from trainer.run.checkpoint import EMA_WEIGHTS, STATE, STEP, WEIGHTS, latest_checkpoint, read_state


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run on disk, with what it was trained on. Close its data."""

    path: Path
    config: TrainConfig
    data: TrainingData
    geometry: Geometry

    @property
    def scale(self) -> LatentScale:
        """How its latents are scaled."""
        return LatentScale.of(self.data.latents.identity)


def open_run(path: Path) -> OpenRun:
    """Open a run and the store it was trained on. Raises UserError when there is no run, or no store."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run (it has no config.yaml); name a folder that `make train RUN=…` wrote")
    config = from_yaml(path / "config.yaml")
    data = open_data(config)
    return OpenRun(path=path, config=config, data=data, geometry=geometry_of(config, data))


def checkpoints_of(run: Path, which: str = "latest") -> list[Path]:
    """The run's checkpoints, oldest first: `latest`, `all`, or steps separated by commas. Raises UserError."""
    named = [path for path in sorted((run / "checkpoints").glob("step-*")) if STEP.fullmatch(path.name)]
    there = {int(path.name.removeprefix("step-")): path for path in named if (path / STATE).is_file()}
    latest = latest_checkpoint(run)
    if latest is None or not there:
        raise UserError(
            f"run {run} has no checkpoint yet; train it first (make train STORE=… RUN={shlex.quote(str(run))})"
        )
    if which == "latest":
        return [latest]
    if which == "all":
        return [there[step] for step in sorted(there)]
    chosen = []
    for text in which.split(","):
        if not text.strip().isdecimal() or int(text) not in there:
            raise UserError(
                f"run {run} has no checkpoint of step {text.strip()!r}; it has {', '.join(map(str, sorted(there)))} "
                "(--checkpoint.keep says how many stay)"
            )
        chosen.append(there[int(text)])
    return chosen


def load_model(run: OpenRun, checkpoint: Path, weights: Weights, device: torch.device) -> nn.Module:
    """The run's model with a checkpoint's averaged (ema) or last (raw) weights. Raises UserError if they do not fit."""
    file = checkpoint / (EMA_WEIGHTS if weights == "ema" else WEIGHTS)
    try:
        _refuse_larger_model(run.geometry, file)
        model = make_model(run.geometry)
        model.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError, StoreError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} cannot be loaded into the model of {run.path} ({first}); name another checkpoint"
        ) from None
    return model.to(device).eval().requires_grad_(False)


def _refuse_larger_model(geometry: Geometry, file: Path) -> None:
    """Raise RuntimeError when the configuration names a model larger than the file, before memory is taken for it.

    Counted are the square matrices of blocks and projectors and the table of classes, at a byte a number.
    """
    with os.fdopen(open_regular(file), "rb") as opened:
        there = os.fstat(opened.fileno()).st_size
    width, projector = geometry.width, geometry.projector_width * bool(geometry.targets)
    least = geometry.depth * width**2 + geometry.n_classes * width + projector**2
    if least > there:
        raise RuntimeError(f"it has {there:,} bytes, the model that config.yaml describes {least:,} or more")


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint."""
    return read_state(checkpoint).step


@torch.inference_mode()
def pooled_hidden_states(
    model: nn.Module,
    run: OpenRun,
    latents: GroupReader,
    rows: np.ndarray,
    t: float,
    blocks: Sequence[int],
    *,
    seed: int,
    batch: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[int, Tensor]:
    """Block (counted from 1) → float32 (len(rows), D) on `device`, of `latents`' rows at time t."""
    states = {block: torch.empty(len(rows), run.geometry.width, device=device) for block in blocks}
    moments = latents["moments"]
    now = slice(0, 0)

    def keep(block: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, arguments: object, tokens: Tensor) -> None:
            states[block][now] = tokens.float().mean(dim=1)

        return hook

    inner: nn.ModuleList = model.blocks  # type: ignore[assignment]
    hooks = [inner[block - 1].register_forward_hook(keep(block)) for block in blocks]
    try:
        for start in range(0, len(rows), batch):
            now = slice(start, min(start + batch, len(rows)))
            stored = np.empty((now.stop - now.start, *moments.row_shape), dtype=moments.dtype)
            moments.read_into(rows[now], 0, stored)
            x_t, times = noisy_latents(torch.from_numpy(stored).to(device), rows[now], t, run, seed)
            null = torch.full((len(x_t),), run.geometry.n_classes, dtype=torch.int64, device=device)
            with model_arithmetic(run.config.precision, device):
                model(x_t, times, null, with_projections=False)
            progress(len(x_t))
    finally:
        for handle in hooks:
            handle.remove()
    return states


def noisy_latents(moments: Tensor, rows: np.ndarray, t: float, run: OpenRun, seed: int) -> tuple[Tensor, Tensor]:
    """x_t float32 (B, C, h, w) of stored moments with the draws of the rows, and what the model is given as t (B,)."""
    index = torch.from_numpy(rows).to(moments.device)
    x = sample_latents(
        Batch(step=0, rows=index, labels=index, moments=moments, targets=(), stall_s=0.0), run.scale, seed
    )
    noise = random_keys.normal(seed, "noise", 0, index, x.shape[1:])
    objective = OBJECTIVES[run.config.model.kind]
    times = objective.model_times(torch.full((len(x),), t, device=x.device))
    return objective.perturb(x, noise, times, run.config.loss), times
