"""Running a vision transformer of timm on a batch: preprocessing, arithmetic, which tokens, and their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.encoders.catalogue import IMAGENET, Normalisation, Preprocessing
from pipeline.encoders.precision import arithmetic


class VisionTransformerEncoder:
    """A timm vision transformer whose `forward_features` gives prefix tokens (class, registers) and patch tokens.

    `tokens` says which are features: "patch", "cls" or "both"; register tokens are left out.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        tokens: str = "both",
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess, self.device, self.precision = preprocess, device, precision
        self.tokens = tokens
        if compiled:
            for block in self.model.blocks:  # one by one: they share their code, which is then compiled once
                block.compile(dynamic=False)

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, T, D) and first prefix token (B, D), float32, of images uint8 (B, H, W, 3)."""
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        x = self.preprocess(x)
        with arithmetic(self.precision, self.device):
            tokens = self.model.forward_features(x).float()
        return tokens[:, self.model.num_prefix_tokens :], tokens[:, 0]

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`patches` float32 (B, T, D) and `cls` float16 (B, D), of them what was asked for."""
        patches, cls = self.encode_tokens(images)
        arrays = {"patches": patches, "cls": cls.half()}
        left_out = {"patch": "cls", "cls": "patches"}.get(self.tokens)
        return {name: array for name, array in arrays.items() if name != left_out}


def preprocess(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What the model sees of x (B, 3, R, R) in [0, 1]."""
    size = (preprocessing.input_size(x.shape[-1]),) * 2
    if preprocessing.resizes and preprocessing.resize_first:
        x = F.interpolate(x, size, mode="bicubic", antialias=False)
    x = normalize(x, preprocessing.normalisation)
    if preprocessing.resizes and not preprocessing.resize_first:
        x = F.interpolate(x, size, mode="bicubic", antialias=False)
    return x


def normalize(x: Tensor, by: Normalisation = IMAGENET) -> Tensor:
    """(x − mean) / std per channel, x (B, 3, H, W) in [0, 1]."""
    return (x - per_channel(by.mean, x)) / per_channel(by.std, x)


def per_channel(values: Sequence[float], x: Tensor) -> Tensor:
    """The values as (C, 1, 1), of x's dtype and device.

    Made there: a tensor of Python's numbers would be copied to a GPU, and the host would wait for that at every batch.
    """
    return torch.cat([x.new_full((1,), value) for value in values])[:, None, None]
