"""Extractors of metrics that fix their own network, input size and vector: those of FDr⁶, and CMMD's.

    fdr-convnext, fdr-dinov2, fdr-mae, fdr-siglip, fdr-clip     FDr⁶ (arXiv 2604.28190), with Inception as the sixth
    cmmd-clip                                                   CMMD (arXiv 2401.09603)

Each is timm's network at one input size, whatever the images'. As FDr⁶'s release has them: x / 255, bicubic with
antialiasing to that size, the network's own mean and deviation; then the class token after the final norm, the pooled
map of ConvNeXt, or SigLIP's attention pooling. As CMMD's has it: bicubic without antialiasing to 336, CLIP's mean and
deviation, the projected class token at length 1. FDr⁶'s release computes in bfloat16; here it is float32, as
everywhere, so that a distance is off by what bfloat16 adds there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.encoders.catalogue import CLIP, HALF, IMAGENET, Normalisation
from pipeline.encoders.precision import arithmetic
from pipeline.encoders.timm_vit import NOT_OF_THE_ENCODER, load_state
from pipeline.encoders.vision import normalize
from pipeline.encoders.weights import file_sha256, find_weights, read_weights
from storage.base.choices import CMMD
from storage.feature_file import FEATURES
from storage.identity import VectorsIdentity


@dataclass(frozen=True, kw_only=True)
class Space:
    """A network, the pixels a side that it sees, and which vector is taken."""

    model: str  # timm's name
    side: int
    width: int
    vector: str  # "cls", "map" (mean over places), "pool" (attention), "projected" (at length 1)
    normalisation: Normalisation = IMAGENET
    antialias: bool = True
    repository: str = ""  # on the hub, where it is not timm's name

    @property
    def preprocessing(self) -> str:
        """As an identity has it."""
        how = "with" if self.antialias else "without"
        return f"x/255, bicubic to {self.side} {how} antialias, {self.normalisation.name}"


SPACES = {
    "fdr-convnext": Space(model="convnextv2_base.fcmae_ft_in22k_in1k", side=224, width=1024, vector="map"),
    "fdr-dinov2": Space(model="vit_large_patch14_dinov2.lvd142m", side=256, width=1024, vector="cls"),
    "fdr-mae": Space(model="vit_large_patch16_224.mae", side=224, width=1024, vector="cls"),
    "fdr-siglip": Space(
        model="vit_so400m_patch16_siglip_256.v2_webli", side=224, width=1152, vector="pool", normalisation=HALF
    ),
    "fdr-clip": Space(
        model="vit_large_patch14_clip_224.openai", side=256, width=1024, vector="cls", normalisation=CLIP
    ),
    CMMD: Space(
        model="vit_large_patch14_clip_quickgelu_336.openai",
        side=336,
        width=768,
        vector="projected",
        normalisation=CLIP,
        antialias=False,
        repository="timm/vit_large_patch14_clip_336.openai",
    ),
}


def describe(name: str, weights: Path | None) -> VectorsIdentity:
    """What determines the numbers. Raises UserError when the weights are missing, with what to fetch."""
    space = SPACES[name]
    return VectorsIdentity(
        name=name,
        encoder=f"timm.{space.model}",
        weights_sha256=file_sha256(_weights(name, weights)),
        preprocessing=space.preprocessing,
        vector=space.vector,
    )


def _weights(name: str, weights: Path | None) -> Path:
    space = SPACES[name]
    return find_weights(weights, name=name, repository=space.repository or f"timm/{space.model}", original="")


class Extractor:
    """A network on a device."""

    def __init__(self, name: str, weights: Path | None, device: torch.device) -> None:
        self._space, self._device = SPACES[name], device
        path = _weights(name, weights)
        model = build(self._space)
        load_state(model, read_weights(path), path, CLASSIFIER[self._space.vector])
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`features` float32 (B, D) of images uint8 (B, H, W, 3)."""
        space = self._space
        x = images.to(self._device).permute(0, 3, 1, 2).float() / 255
        if x.shape[2:] != (space.side, space.side):
            x = F.interpolate(x, (space.side, space.side), mode="bicubic", antialias=space.antialias)
        with arithmetic("fp32", self._device):
            tokens = self._model.forward_features(normalize(x, space.normalisation))
            return {FEATURES: VECTORS[space.vector](self._model, tokens).float()}


# What a weight file has and the network has not: classifiers, and the half of MAE that draws.
CLASSIFIER = {"cls": NOT_OF_THE_ENCODER, "map": ("head.fc.",), "pool": NOT_OF_THE_ENCODER, "projected": ()}
VECTORS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cls": lambda model, tokens: tokens[:, 0],
    "map": lambda model, tokens: tokens.mean((2, 3)),
    "pool": lambda model, tokens: model.pool(tokens),
    "projected": lambda model, tokens: F.normalize(model.forward_head(tokens), dim=-1),
}


def build(space: Space, **settings: Any) -> Any:
    """The architecture, with random weights. `settings` are timm's."""
    import timm

    size: dict[str, Any] = {} if space.vector == "map" else {"img_size": space.side}
    if space.side % 14 and "patch14" in space.model:  # 256 is cut into 19 patches of 14, the last of them padded
        size = {"dynamic_img_size": True, "dynamic_img_pad": True}
    classes = {} if space.vector == "projected" else {"num_classes": 0}
    return timm.create_model(space.model, pretrained=False, **{**size, **classes, **settings})
