"""MoCo v3 (arXiv 2104.02057): timm's ViT with the paper's 12 heads in ViT-S, and the public checkpoint's names.

The checkpoint holds a whole training run under `module.`: the base encoder, its momentum copy and the predictor. The
features are the base encoder's. In the public ViT-L (of RCG, arXiv 2312.03701), four names of blocks 13 and 14 carry
the block's number where the layer's should be (`blocks.13.norm13` for `blocks.13.norm1`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.encoders import timm_vit
from pipeline.encoders.registry import EncoderSpec
from pipeline.encoders.vision import VisionTransformerEncoder
from storage.final_norm import FinalNorm
from storage.identity import FeaturesIdentity

BASE = "base_encoder."
MISNAMED = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def describe(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """Identity of the features."""
    return replace(timm_vit.describe(spec, resolution=resolution), encoder=f"mocov3.{spec.model}")


def outline(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """What is known of the features without the weights."""
    return replace(timm_vit.outline(spec, resolution=resolution), encoder=f"mocov3.{spec.model}")


def load(spec: EncoderSpec, *, resolution: int, device: torch.device) -> VisionTransformerEncoder:
    """Load the encoder at a crop's resolution."""
    return timm_vit.load(spec, resolution=resolution, device=device, convert=public_to_timm)


def final_norm(spec: EncoderSpec) -> FinalNorm | None:
    """Weight and bias of the base encoder's final norm."""
    return timm_vit.final_norm(spec, convert=public_to_timm)


def public_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base encoder of a public checkpoint under timm's names; a file of the bare encoder passes unchanged."""
    if any(name.startswith(BASE) for name in state):
        state = {name.removeprefix(BASE): value for name, value in state.items() if name.startswith(BASE)}
    renamed = {}
    for name, value in state.items():
        wrong = next((wrong for wrong in MISNAMED if name.startswith(wrong)), "")
        renamed[MISNAMED[wrong] + name.removeprefix(wrong) if wrong else name] = value
    return renamed
