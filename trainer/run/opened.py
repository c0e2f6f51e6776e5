"""A run opened to be read: its configuration, the store it was trained on, its checkpoints, its model."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from storage.base.boundary import open_regular
from storage.base.errors import StoreError, UserError
from storage.base.shown import shown
from trainer.config.schema import TrainConfig
from trainer.data.groups import TrainingData, geometry_of, open_data
from trainer.data.latent_scale import LatentScale
from trainer.models.make import make_model
from trainer.models.transformer import Geometry
from trainer.run.checkpoint import EMA_WEIGHTS, STATE, WEIGHTS, latest_checkpoint, read_state
from trainer.run.folder import RunFolder
from trainer.run.latent_map import map_of


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run on disk, with what it was trained on. Close its data."""

    path: Path
    config: TrainConfig
    data: TrainingData
    geometry: Geometry

    def __repr__(self) -> str:
        of = f"{self.config.preset}, {self.config.steps:,} steps on {self.data.store.root}"
        return shown(f"<{type(self).__name__} {self.path}: {of}>")

    @cached_property
    def scale(self) -> LatentScale:
        """How its latents are normalised, as while it was trained."""
        return map_of(self.config, self.data, self.path)


def open_run(path: Path) -> OpenRun:
    """Open a run and the store it was trained on. Raises UserError when there is no run, or no store."""
    if not RunFolder(path).is_run:
        raise UserError(f"{path} is not a run (it has no config.yaml); name a folder that `make train RUN=…` wrote")
    config = RunFolder(path).read_config().config
    data = open_data(config)
    return OpenRun(path=path, config=config, data=data, geometry=geometry_of(config, data))


def checkpoints_of(run: Path, which: str = "latest") -> list[Path]:
    """The run's checkpoints, oldest first: `latest`, `all`, or steps separated by commas. Raises UserError."""
    checkpoints = {step: path for step, path in RunFolder(run).checkpoint_folders().items() if (path / STATE).is_file()}
    latest = latest_checkpoint(run)
    if latest is None or not checkpoints:
        raise UserError(
            f"run {run} has no checkpoint yet; train it first (make train STORE=… RUN={shlex.quote(str(run))})"
        )
    if which == "latest":
        return [latest]
    if which == "all":
        return list(checkpoints.values())
    chosen = []
    for text in which.split(","):
        if not text.strip().isdecimal() or int(text) not in checkpoints:
            raise UserError(
                f"run {run} has no checkpoint of step {text.strip()!r}; it has {', '.join(map(str, checkpoints))} "
                "(--checkpoint.keep says how many stay)"
            )
        chosen.append(checkpoints[int(text)])
    return chosen


def load_model(run: OpenRun, checkpoint: Path, weights: Literal["ema", "raw"], device: torch.device) -> nn.Module:
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
        n_bytes = os.fstat(opened.fileno()).st_size
    width, projector = geometry.width, geometry.projector_width * any(kind.has_hidden_layers for kind in geometry.kinds)
    least = geometry.depth * width**2 + geometry.n_classes * width + projector**2
    if least > n_bytes:
        raise RuntimeError(f"it has {n_bytes:,} bytes, the model that config.yaml describes {least:,} or more")


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint."""
    return read_state(checkpoint).step
