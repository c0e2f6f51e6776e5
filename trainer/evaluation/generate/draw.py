"""A model's latents of numbered images: image i is the same wherever and beside whichever others it is drawn.

Its noise is keyed by (seed, i): step 0 of the purpose `sample` is the starting noise, step k + 1 that of the sampler's
step k. What else its last bits depend on is the batch that it is computed in, which is the caller's matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.schema import TrainConfig
from trainer.loop import random_keys
from trainer.models.transformer import Geometry
from trainer.objectives.sampling import sample
from trainer.ranks.arithmetic import autocast_dtype


def draw_latents(
    model: nn.Module, images: Tensor, labels: Tensor, geometry: Geometry, config: TrainConfig, seed: int
) -> Tensor:
    """Scaled latents float64 (B, C, h, w) of image numbers and labels int64 (B,), by `config`'s sampler."""
    shape = (geometry.channels, geometry.input_size, geometry.input_size)
    half = autocast_dtype(config.precision)
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        return sample(
            lambda x, t, y: model(x, t, y, with_projections=False)[0],
            random_keys.normal(seed, "sample", 0, images, shape),
            labels,
            geometry.n_classes,
            config.sample,
            config.loss.path,
            lambda step: random_keys.normal(seed, "sample", step + 1, images, shape),
        )
