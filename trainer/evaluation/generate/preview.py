"""Grids of samples while a run trains, from its averaged weights: RUN/samples/step-NNNNNNN.png.

The images are the same ones each time (seed, index and class), so a flip-book of them shows training. Ranks share them
out. They are decoded when the store's VAE lies on this machine, which is let go of again; otherwise the latents
themselves are shown, their first three channels as colours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.base.errors import UserError
from trainer.data.groups import TrainingData
from trainer.evaluation.generate.decode import decode_latents, decoder_of, load_decoder, to_decode, write_grid
from trainer.evaluation.generate.draw import draw_latents
from trainer.loop.step import TrainingState
from trainer.ranks.parallel import reshard
from trainer.run.folder import RunFolder

LATENT_ZOOM = 4


@torch.no_grad()
def write_preview(
    training: TrainingState, data: TrainingData, step: int, on_call: Callable[[int], None] | None = None
) -> tuple[Path, np.ndarray] | None:
    """Draw and write the grid of `step`; returns path and pixels uint8 (H, W, 3) on the main rank.

    Every rank must call it. `on_call` is told of each call of the model, as `draw_latents` says.
    """
    config, geometry, world = training.config, training.geometry, training.world
    share = -(-config.log.samples // world.size)  # as many on each rank, since sharded weights are gathered together
    images = torch.arange(world.rank * share, (world.rank + 1) * share, device=world.device)
    n_classes = len(data.class_names)
    labels = images % n_classes if n_classes else torch.full_like(images, geometry.n_classes)  # the null label
    latents = draw_latents(training.ema.model, images, labels, geometry, config, config.seed, on_call=on_call)
    reshard(training.ema.model)
    latents = world.gather(latents)[: config.log.samples]
    if not world.is_main:
        return None
    path = RunFolder(config.run).preview(step)
    return path, write_grid(_pictures(latents, training, data), path)


def _pictures(latents: Tensor, training: TrainingState, data: TrainingData) -> np.ndarray:
    """Images uint8 (N, H, W, 3) of scaled latents, decoded if that is possible here."""
    decoder, device = decoder_of(data, training.config), training.world.device
    try:
        if decoder:
            loaded = load_decoder(decoder, device, fetch=False, of=data)
            return decode_latents(to_decode(latents, training.scale, data), loaded)
    except (UserError, ImportError, torch.OutOfMemoryError):
        pass  # the picture is a convenience, and no reason to end a run
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return latents_as_colours(training.scale.stored(latents))


def latents_as_colours(latents: Tensor) -> np.ndarray:
    """Images uint8 (N, zoom·h, zoom·w, 3) of latents (N, C, h, w): the first channels, three standard deviations wide.

    Fewer than three channels are repeated.
    """
    n_channels = latents.shape[1]
    shown = latents[:, [i % n_channels for i in range(3)]].float()
    mean, std = shown.mean((0, 2, 3), keepdim=True), shown.std((0, 2, 3), keepdim=True)
    scaled = ((shown - mean) / (6 * std + 1e-12) + 0.5).clamp(0, 1)
    zoomed = F.interpolate(scaled, scale_factor=LATENT_ZOOM, mode="nearest")
    return (zoomed * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
