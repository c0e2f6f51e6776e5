"""Autoencoders with random weights, and what they are asked in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoders import registry
from storage.identity import LatentsIdentity, parse
from tests.pipeline.encoding import shapes_of

CPU = torch.device("cpu")
KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
}
WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.1, -0.7, 0.3, 1.5],
    "latents_std": [2.8, 1.4, 0.3, 1.1],
}


def pictures(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def encode(name: str, resolution: int, n: int = 3) -> tuple[LatentsIdentity, np.ndarray]:
    spec = registry.resolve_latents(name)
    identity = registry.describe(spec, resolution=resolution)
    encoder = registry.load(spec, resolution=resolution, device=CPU)
    moments = registry.encode_images(encoder, pictures(n, resolution))["moments"]
    assert moments.dtype == np.float16
    assert {"moments": moments.shape[1:]} == shapes_of(identity)
    assert isinstance(identity, LatentsIdentity)
    assert parse(LatentsIdentity, identity.plain(), "", "") == identity
    return identity, moments


def to_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255 * 2 - 1
