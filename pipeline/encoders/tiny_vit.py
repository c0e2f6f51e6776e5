"""The built-in vision encoders: `tiny-vit` (see `tiny/`), `glyph-vit`, `glyph-namer` (`glyph/`); x / 127.5 − 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.encoders.catalogue import HALF
from pipeline.encoders.registry import EncoderSpec
from pipeline.encoders.timm_vit import cut, layer_name, norm_in
from pipeline.encoders.vision import VisionTransformerEncoder, normalize
from pipeline.encoders.weights import file_sha256, read_weights
from storage.base.errors import UserError
from storage.final_norm import FinalNorm
from storage.identity import FeaturesIdentity


def describe(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """Identity of the features."""
    config = _config(spec)
    known = config["img_size"]
    if resolution != known:
        raise UserError(f"{spec.store_name} knows {known} px only; pass --resolution {known}, got {resolution}")
    side = config["img_size"] // config["patch_size"]
    return FeaturesIdentity(
        encoder="timm.VisionTransformer",
        weights_sha256=file_sha256(_weights(spec)),
        preprocessing="x/127.5-1",
        layer=layer_name(spec, config["depth"]),
        tokens=spec.tokens,
        token_grid=(side, side),
        width=config["embed_dim"],
    )


def load(spec: EncoderSpec, *, resolution: int, device: torch.device) -> VisionTransformerEncoder:
    """Load the encoder."""
    from timm.models.vision_transformer import VisionTransformer

    config = _config(spec)
    assert resolution == config["img_size"]
    model = VisionTransformer(**config)
    model.load_state_dict(read_weights(_weights(spec)))
    return VisionTransformerEncoder(
        cut(model, spec),
        lambda x: normalize(x, HALF),
        device,
        tokens=spec.tokens,
        precision=spec.precision,
        compiled=spec.compiled,
    )


def final_norm(spec: EncoderSpec) -> FinalNorm | None:
    """Weight and bias of the final norm."""
    return norm_in(_weights(spec))


def _config(spec: EncoderSpec) -> dict[str, Any]:
    return json.loads((Path(spec.model) / "config.json").read_text())


def _weights(spec: EncoderSpec) -> Path:
    return spec.weights or Path(spec.model) / "model.safetensors"
