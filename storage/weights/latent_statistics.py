"""A file of the statistics by which a project normalises its latents, channel by channel; read as data.

    mean, std                       LightningDiT's `latents_stats.pt`, (1, C, 1, 1):   z = (x − mean) / std
    latents_scale, latents_bias     REPA-E's `…-latents-stats.pt`, (1, C, 1, 1):       z = (x − bias) · scale

Of tokens, a number a channel and place:

    mean, var                       RAE's and RiT's `stat.pt`:                          z = (x − mean) / √(var + 1e-5)
    _latents_mean, _latents_std     in the weights of diffusers' AutoencoderRAE:        z = (x − mean) / (std + 1e-5)

REPA-E's transformer adds 1e-4 to the variance as it normalises (arXiv 2504.10483, its batch norm); iREPA does not.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.normalisation import Normalisation, made
from storage.places import OF_CLASS, OF_TOKENS, PlaceStatistics, checked
from storage.weights.file import open_weights
from storage.weights.tensors import Stored

OF_RAE = ("_latents_mean", "_latents_std")
EPSILON = 1e-5  # that diffusers adds to the deviation, and the map of features as latents to the variance
IN_FOLDER = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PAIRS = (("mean", "std"), ("latents_bias", "latents_scale"))
MAX_NUMBERS = 1 << 16


def read_place_statistics(path: Path, shape: tuple[int, ...]) -> PlaceStatistics:
    """RAE's or RiT's statistics in a file, of tokens of `shape` (D, h, w). Raises UserError or StoreError.

    Of an AutoencoderRAE's folder, or its weights, those by which it normalises: the variance is what gives its divisor.
    """
    if path.is_dir():
        path = next((path / name for name in IN_FOLDER if (path / name).is_file()), path / IN_FOLDER[0])
    where = shown(str(path))
    with open_weights(path) as file:
        tensors = {name: value for name, value in file.entries().items() if isinstance(value, Stored)}
        tensors = {name: value for name, value in tensors.items() if name in (*OF_TOKENS, *OF_CLASS, *OF_RAE)}
        too_large = next((name for name, value in tensors.items() if value.nbytes > 8 * math.prod(shape)), None)
        if too_large is not None:
            raise UserError(
                f"{where}: {too_large} is {list(tensors[too_large].shape)[:8]}, and the features are {list(shape)}; "
                "use the statistics of these features"
            )
        arrays = {name: value.double().numpy() for name, value in file.tensors(tensors).items()}
    if arrays.keys() >= set(OF_RAE) and not arrays.keys() & set(OF_TOKENS):
        arrays = _of_rae(arrays, where, shape)
    return checked(arrays, where, "use the statistics of these features", shape)


def _of_rae(arrays: dict[str, np.ndarray], where: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    mean, std = (arrays[name] for name in OF_RAE)
    if mean.size == 1 and std.size == 1:  # what such an autoencoder has where it does not normalise
        raise UserError(f"{where} is of an AutoencoderRAE without statistics; leave --data.latent-statistics out")
    with contextlib.suppress(ValueError):  # `checked` says which shape it has
        mean, std = (np.broadcast_to(of, shape) for of in (mean, std))  # some have a number a channel
    return {"mean": mean, "var": np.maximum(np.square(std + EPSILON) - EPSILON, 0)}


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
