"""Running a vision transformer of timm on a batch: preprocessing, arithmetic, which tokens, and their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.encoders.catalogue import IMAGENET, Normalisation, Preprocessing
from pipeline.encoders.precision import arithmetic
from pipeline.quantise import quantise
from storage.codec import Int8Codec
from storage.errors import UserError


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
        codec: Int8Codec | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess, self.device, self.precision = preprocess, device, precision
        self.tokens, self.codec = tokens, codec
        if compiled:
            for block in self.model.blocks:  # one by one: they share their code, which is then compiled once
                block.compile()

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, T, D) and first prefix token (B, D), float32, of images uint8 (B, H, W, 3)."""
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        x = self.preprocess(x)
        with arithmetic(self.precision, self.device):
            tokens = self.model.forward_features(x).float()
        return tokens[:, self.model.num_prefix_tokens :], tokens[:, 0]

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`patches` float16 (B, T, D) and `cls` float16 (B, D); with a codec `patches` int8 and `scale` (B, T, G).

        Raises UserError when a value is beyond float16; quantised tokens say so in their factors.
        """
        patches, cls = self.encode_tokens(images)
        return to_arrays(patches if self.tokens != "cls" else None, cls if self.tokens != "patch" else None, self.codec)


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
    return (x - x.new_tensor(by.mean)[:, None, None]) / x.new_tensor(by.std)[:, None, None]


def to_arrays(patches: Tensor | None, cls: Tensor | None, codec: Int8Codec | None) -> dict[str, Tensor]:
    """What is stored of patch tokens (B, T, D) and class token (B, D), of those that are given."""
    arrays = {}
    if patches is not None:
        if codec is None:
            arrays["patches"] = to_float16(patches, "patch tokens")
        else:
            arrays["patches"], arrays["scale"] = quantise(patches, codec)
    if cls is not None:
        arrays["cls"] = to_float16(cls, "class tokens")
    return arrays


def to_float16(x: Tensor, what: str) -> Tensor:
    """x as float16. Raises UserError for NaN, infinity and what float16 cannot hold, naming the image of the batch."""
    half = x.half()
    finite = half.isfinite().flatten(1).all(1)
    if not finite.all():
        raise UserError(
            f"{what} of image {int(finite.int().argmin())} of a batch are NaN or beyond float16 (65,504); "
            "pass --precision fp32, or bf16, when it is the arithmetic that overflows"
        )
    return half
