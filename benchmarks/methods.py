"""The methods that are measured beside REPA: presets, and `PRESET:CHANGE` where a method has no preset of its own.

sit-xl-2:irepa, sit-xl-2:irepa-1     iREPA, with the paper's kernel and with the public code's
sit-xl-2:stopped                     a step after the alignment's end (HASTE's schedule)
"""

from __future__ import annotations

from typing import Any

from storage.base.errors import UserError
from trainer.alignment import alignment_named
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.models.flops import forward_flops_per_image
from trainer.models.transformer import Geometry
from trainer.run.settings import with_shifts

N_CLASSES = 1000
CHANGES: dict[str, dict[str, Any]] = {
    "irepa": {"loss.alignment": ("irepa",), "loss.projection_weight": (1.0,)},
    "irepa-1": {"loss.alignment": ("irepa:kernel=1",), "loss.projection_weight": (1.0,)},
    "stopped": {"loss.stop_alignment_at": 1},
}
SD_VAE, F16 = (4, 8), (32, 16)  # channels, and pixels a side of one latent
FEATURES = {"rit": (384, 16), "ditdh": (768, 16)}
LEARNT = {"rit": "dinov2-vits14-reg", "ditdh": "dinov2-vitb14-reg"}  # whose tokens these are


def method(name: str) -> TrainConfig:
    """The configuration of PRESET or PRESET:CHANGE. Raises UserError, naming what there is."""
    base, _, change = name.partition(":")
    if change and change not in CHANGES:
        raise UserError(f"{name}: there is no change {change!r}, but {', '.join(CHANGES)}")
    config = override(preset(base), CHANGES.get(change, {}))
    channels, side = latents_of(config)
    return with_shifts(config, channels * side**2)


def latents_of(config: TrainConfig) -> tuple[int, int]:
    """Channels and side of the latents.

    Those that a method was published with: features of DINOv2-S or -B, or where the patch is one an autoencoder's of
    factor 16, else SD-VAE's.
    """
    channels, factor = FEATURES.get(config.model.kind) or (F16 if config.model.patch == 1 else SD_VAE)
    return channels, (config.data.resolution or 256) // factor


def on_imagenet(config: TrainConfig, target_width: int = 768) -> Geometry:
    """The model on ImageNet, aligned with features of one width."""
    model, targets = config.model, config.targets
    channels, side = latents_of(config)
    return Geometry(
        kind=model.kind,
        input_size=side,
        channels=channels,
        patch=model.patch,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        n_classes=N_CLASSES,
        qk_norm=model.qk_norm,
        targets=tuple((target.block, target_width) for target in targets),
        alignments=tuple(alignment_named(target.alignment) for target in targets),
        class_width=(channels if model.kind in FEATURES else target_width) if model.class_token else 0,
        projector_width=model.projector_width,
        head_width=model.head_width,
        head_depth=model.head_depth,
        head_heads=model.head_heads,
        context=model.context,
        context_block=model.context_block,
    )


def measured_step(config: TrainConfig) -> int:
    """The step that is measured: the first, or the first after the alignment's end."""
    return config.loss.stop_alignment_at


def step_flops(config: TrainConfig, target_width: int = 768) -> int:
    """Forward and backward pass of one image in that step."""
    aligned = config.aligns_at(measured_step(config))
    return 3 * forward_flops_per_image(on_imagenet(config, target_width), aligned)
