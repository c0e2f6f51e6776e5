"""Draw images from a run's averaged weights. Image i depends on the seed and i alone, not on how many are drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from storage.errors import UserError
from trainer import random_keys
from trainer.checkpoint import latest_checkpoint, load_ema_weights
from trainer.config import from_yaml
from trainer.data import model_config, open_data
from trainer.evaluation.decode import decode_latents, write_grid
from trainer.models.transformer import DiffusionTransformer
from trainer.sampling import sample
from trainer.step import LatentScale

BATCH = 64


@torch.inference_mode()
def write_samples(
    run: Path, n: int, out: Path | None, vae: str, guidance: float | None, steps: int | None, seed: int
) -> Path:
    """Write a grid of `n` images, classes in turn, and return its path. Raises UserError."""
    if n < 1:
        raise UserError(f"--n must be at least 1, got {n}")
    config = from_yaml(run / "config.yaml")
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"run {run} has no checkpoint yet; train it first (make train RUN={run})")
    data = open_data(config)
    data.close()  # only what it says is needed, not its rows
    decoder = vae or data.latents.attributes["provenance"].get("decoder", "")
    if not decoder:
        raise UserError(f"{data.latents.path} does not say what decodes it; pass --vae with a diffusers directory")
    geometry = model_config(config, data)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    model = DiffusionTransformer(geometry)
    model.load_state_dict(load_ema_weights(checkpoint))
    model = model.to(device).eval()
    sampler = dataclasses.replace(
        config.sample,
        steps=config.sample.steps if steps is None else steps,
        guidance=config.sample.guidance if guidance is None else guidance,
    )
    shape = (geometry.channels, geometry.input_size, geometry.input_size)
    images = torch.arange(n, device=device)
    latents = []
    for part in images.split(BATCH):
        # Step 0 of the purpose is the starting noise, step i + 1 that of the sampler's step i.
        latents.append(
            sample(
                lambda x, t, y: model(x, t, y, with_projections=False)[0],
                random_keys.normal(seed, "sample", 0, part, shape),
                part % len(data.class_names),
                geometry.n_classes,
                sampler,
                config.loss.path,
                lambda i, part=part: random_keys.normal(seed, "sample", i + 1, part, shape),  # type: ignore[misc]
            )
        )
    scale = LatentScale.of(data.latents.identity)
    pictures = decode_latents(torch.cat(latents) / scale.scale + scale.shift, decoder, device)
    path = out or run / "samples.png"
    write_grid(pictures, path)
    return path
