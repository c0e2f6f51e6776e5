"""A file of the statistics by which a project normalises its latents, channel by channel; read as data.

    mean, std                       LightningDiT's `latents_stats.pt`, (1, C, 1, 1):   z = (x − mean) / std
    latents_scale, latents_bias     REPA-E's `…-latents-stats.pt`, (1, C, 1, 1):       z = (x − bias) · scale

REPA-E's transformer adds 1e-4 to the variance as it normalises (arXiv 2504.10483, its batch norm); iREPA does not.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.normalisation import Normalisation, made
from storage.places import OF_CLASS, OF_TOKENS, PlaceStatistics, checked
from storage.weights.file import open_weights
from storage.weights.tensors import Stored

PAIRS = (("mean", "std"), ("latents_bias", "latents_scale"))
MAX_NUMBERS = 1 << 16


def read_place_statistics(path: Path, shape: tuple[int, ...]) -> PlaceStatistics:
    """RAE's or RiT's statistics in a file, of tokens of `shape` (D, h, w). Raises UserError or StoreError."""
    where = shown(str(path))
    with open_weights(path) as file:
        tensors = {name: value for name, value in file.entries().items() if isinstance(value, Stored)}
        tensors = {name: value for name, value in tensors.items() if name in (*OF_TOKENS, *OF_CLASS)}
        too_large = next((name for name, value in tensors.items() if value.nbytes > 8 * math.prod(shape)), None)
        if too_large is not None:
            raise UserError(
                f"{where}: {too_large} is {list(tensors[too_large].shape)[:8]}, and the features are {list(shape)}; "
                "use the statistics of these features"
            )
        arrays = {name: value.double().numpy() for name, value in file.tensors(tensors).items()}
    return checked(arrays, where, "use the statistics of these features", shape)


def read_statistics(path: Path, channels: int, *, epsilon: float = 0.0) -> Normalisation:
    """The statistics in a file of `channels` channels; `epsilon` is added to the variance. Raises UserError."""
    where = shown(str(path))
    with open_weights(path) as file:
        tensors = {name: value for name, value in file.entries().items() if isinstance(value, Stored)}
        names = next((pair for pair in PAIRS if tensors.keys() >= set(pair)), None)
        if names is None:
            held = ", ".join(shown(name[:80]) for name in list(tensors)[:4]) or "no tensor"
            raise UserError(
                f"{where} holds {held}; statistics of latents are mean and std (LightningDiT), or latents_bias and "
                "latents_scale (REPA-E)"
            )
        for name in names:
            if tensors[name].nbytes > 8 * MAX_NUMBERS:
                raise UserError(
                    f"{where}: {name} is {list(tensors[name].shape)[:8]}; statistics are a number a channel"
                )
        read = file.tensors({name: tensors[name] for name in names})
    if not all(value.is_floating_point() for value in read.values()):
        raise UserError(
            f"{where}: {names[0]} and {names[1]} must be floating-point numbers; use the file as it was saved"
        )
    mean, spread = (read[name].to(torch.float64).flatten() for name in names)
    std = spread if names[1] == "std" else 1 / spread
    if epsilon:
        std = (std.square() + epsilon).sqrt()
    added = f", {epsilon:g} added to the variance" if epsilon else ""
    source = f"{names[0]} and {names[1]} of a file{added}"
    return made(mean.tolist(), std.tolist(), channels=channels, source=source, where=where)
