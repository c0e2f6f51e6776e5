"""`python -m pipeline features`: one vector an image from a named encoder, for `python -m trainer evaluate`.

Encoders are Inception (FID) and every vision encoder a store can be made with: a Fréchet distance in DINOv2's features
(Stein et al., arXiv 2306.04675) uses the same code, weights and preprocessing as the alignment does.

Memory: what is described stays in memory until it is written; of Inception 20 kB an image, 2 GB in all for 50,000.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.encoders import registry
from pipeline.images import open_images
from storage.console import progress_bar
from storage.errors import UserError
from storage.feature_file import FEATURES, open_feature_file, write_feature_file

INCEPTION = "inception"
OF_A_STORE = ("kind", "crop", "dtype")  # of an encoder's identity, what says how a store keeps its features
Token = Literal["cls", "mean"]
Encode = Callable[[np.ndarray], dict[str, np.ndarray]]


def write_features(
    where: Path | str,
    out: Path,
    *,
    encoder: str,
    weights: Path | None,
    token: Token,
    resolution: int,
    limit: int,
    batch: int,
    device: str,
) -> str:
    """Describe the images into a feature file; returns what was done. What `out` holds of the same images is kept.

    Raises UserError, before anything is computed, when images or weights are missing.
    """
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")
    images = open_images(where, resolution=resolution, limit=limit)
    size = next(images.read(1)).shape[1:3]
    identity, load = resolve(encoder, weights, token, size)
    if out.is_file():
        there = open_feature_file(out)
        if there.identity == identity and there.images == images.record:
            return f"{out} describes these {images.n} images by {encoder} already; it was kept"
    encode = load(device)
    parts: dict[str, list[np.ndarray]] = {}
    with progress_bar(images.n, unit="img", description=encoder) as bar:
        for part in images.read(batch):
            for name, array in encode(part).items():
                parts.setdefault(name, []).append(array)
            bar.update(len(part))
    write_feature_file(out, {name: np.concatenate(p) for name, p in parts.items()}, identity, images.record)
    return f"{out}: {images.n} images by {encoder}"


def resolve(
    name: str, weights: Path | None, token: Token, size: tuple[int, ...]
) -> tuple[dict[str, Any], Callable[[str], Encode]]:
    """An encoder's identity, and what loads it onto a named device. Raises UserError when its weights are missing."""
    if name == INCEPTION:
        from pipeline.encoders import inception

        return inception.describe(weights), lambda device: partial(
            registry.encode_images, inception.Inception(weights, _device(device))
        )
    try:
        spec = registry.resolve_features(name, weights)
    except UserError as error:
        raise UserError(f"{error}, and {INCEPTION}") from None
    if size[0] != size[1]:
        raise UserError(f"{name} takes square images, these are {size[1]}×{size[0]}; pass --resolution to crop them")
    described = registry.describe(spec, resolution=size[0])
    identity = {key: value for key, value in described.items() if key not in OF_A_STORE}

    def load(device: str) -> Encode:
        loaded = registry.load(spec, resolution=size[0], device=_device(device))

        def encode(images: np.ndarray) -> dict[str, np.ndarray]:
            arrays = registry.encode_images(loaded, images)
            if token == "mean" and "patches" in arrays:
                return {FEATURES: arrays["patches"].astype(np.float32).mean(axis=1)}
            if token not in arrays:
                raise UserError(f"{name} has no vector {token!r}; pass --token {'cls' if token == 'mean' else 'mean'}")
            return {FEATURES: arrays["cls"].astype(np.float32)}

        return encode

    return {**identity, "name": name, "vector": token}, load


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and torch sees no GPU; pass --device cpu or mend the driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
