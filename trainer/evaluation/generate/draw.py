"""A model's latents of numbered images: image i is the same wherever and beside whichever others it is drawn.

Its noise is keyed by (seed, i): step 0 of the purpose `sample` is the starting noise, step k + 1 that of the sampler's
step k. What else its last bits depend on is the batch that it is computed in, which is the caller's matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.config.schema import TrainConfig
from trainer.evaluation.options import LabelsDrawn
from trainer.loop import random_keys
from trainer.models.reg import join, split
from trainer.models.transformer import Geometry
from trainer.objectives import OBJECTIVES
from trainer.objectives.sampling import class_scale, sample
from trainer.ranks.arithmetic import autocast_dtype


def in_words(config: TrainConfig) -> str:
    """How images are drawn, for people."""
    sample = config.sample
    steps = f"{sample.sampler}{' (Heun)' if sample.heun else ''} in {sample.steps} steps"
    of_class = class_scale(sample) if config.model.class_token else 0.0
    if sample.guidance == 1 and of_class in (0, 1):
        return f"{steps}, without guidance"
    what = f"guidance {sample.guidance:g}"
    if config.model.class_token:
        what += f" of the image and {f'{of_class:g}' if of_class else 'none'} of the class token"
    what += f" for t from {sample.guidance_low:g} to {sample.guidance_high:g}"
    low, high = sample.class_interval
    if (
        config.model.class_token
        and of_class not in (0, 1)
        and (low, high) != (sample.guidance_low, sample.guidance_high)
    ):
        what += f", of the class token from {low:g} to {high:g}"
    return f"{steps}, {what}"


def labels_of(images: Tensor, n_classes: int, labels: LabelsDrawn | None, seed: int) -> Tensor:
    """Classes int64 (B,) of image numbers: in turn (balanced), or each drawn on its own (random).

    A model without classes has the null label alone, 0.
    """
    if n_classes == 0:
        return torch.zeros_like(images)
    if labels == "balanced":
        return images % n_classes
    return (random_keys.uniform(seed, "label", 0, images).double() * n_classes).long()


def draw_latents(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    geometry: Geometry,
    config: TrainConfig,
    seed: int,
    weaker: nn.Module | None = None,
    on_call: Callable[[int], None] | None = None,
) -> Tensor:
    """Scaled latents float64 (B, C, h, w) of image numbers and labels int64 (B,), by `config`'s sampler.

    Guidance leads away from what the `weaker` model says of the same label, where there is one.

    A model with class tokens draws these beside the images, and they are let go. `on_call` is given the number of calls
    of the model that have begun, for a progress bar; a call is what is queued, so on a GPU it runs ahead.
    """
    shape = (geometry.channels, geometry.input_size, geometry.input_size)

    def noise(step: int) -> Tensor:
        of_image = random_keys.normal(seed, "sample", step, images, shape)
        if not geometry.class_width:
            return of_image
        if config.sample.class_noise == "mean":
            return join(of_image, of_image.mean((2, 3)))
        return join(of_image, random_keys.normal(seed, "class-sample", step, images, (geometry.class_width,)))

    calls = itertools.count(1)

    def output_of(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if on_call is not None:
            on_call(next(calls))
        output: Tensor = model(x, t, y, with_projections=False)[0]
        return output

    half = autocast_dtype(config.precision)
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        drawn = sample(
            output_of,
            noise(0),
            labels,
            geometry.n_classes,
            config.sample,
            config.loss.path,
            lambda step: noise(step + 1),
            class_width=geometry.class_width,
            objective=OBJECTIVES[geometry.kind],
            weaker=(lambda x, t, y: weaker(x, t, y, with_projections=False)[0]) if weaker is not None else None,
        )
    return split(drawn, geometry)[0]
