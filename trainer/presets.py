"""Recipes: a preset is a function that returns the whole configuration, model and optimisation together.

`sit-{s,b,l,xl}-{2,4,8}` are the SiT sizes (Ma et al., arXiv 2401.08740, table 1: depth, width, heads) with REPA's
settings (Yu et al., arXiv 2410.06940, section 4 and appendix D): linear path, velocity, uniform t, λ = 0.5, AdamW at
1e-4, global batch 256, EMA 0.9999, 400,000 steps. Hidden states are aligned after block 8 for L and XL and after
block 4 for B, as published. S has no published setting; a third of its 12 blocks is block 4, as for B.

Labels are dropped once, with probability 0.1. (The public training script drops them and its model drops them again,
19 % in all; the paper says 10 %.)

`sit-tiny-2` is for the demo and for tests on a CPU: a few minutes on two cores. It is no published model.

The vanilla model is any of them with `--loss.projection-weight 0`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from storage.errors import UserError
from trainer.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    close_matches,
)

# size: (depth, width, heads, block aligned)
SIT_SIZES = {"s": (12, 384, 6, 4), "b": (12, 768, 12, 4), "l": (24, 1024, 16, 8), "xl": (28, 1152, 16, 8)}
PATCHES = (2, 4, 8)
DEFAULT_PRESET = "sit-xl-2"


def sit(size: str, patch: int) -> TrainConfig:
    """SiT with REPA's published settings."""
    depth, width, heads, align_block = SIT_SIZES[size]
    name = f"sit-{size}-{patch}"
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        model=ModelConfig(depth=depth, width=width, heads=heads, patch=patch, align_block=(align_block,)),
    )


def sit_tiny(patch: int = 2) -> TrainConfig:
    """A model of about a million parameters that learns the built-in photographs on two CPU cores."""
    return TrainConfig(
        preset=f"sit-tiny-{patch}",
        run=Path("runs") / f"sit-tiny-{patch}",
        steps=1000,
        batch=32,
        ema_decay=0.99,
        model=ModelConfig(depth=4, width=128, heads=4, patch=patch, align_block=(2,), projector_width=256),
        optim=OptimConfig(lr=2e-3),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=10),
        sample=SampleConfig(sampler="ode", steps=50, guidance=2.5),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    **{f"sit-{size}-{patch}": lambda s=size, p=patch: sit(s, p) for size in SIT_SIZES for patch in PATCHES},  # type: ignore[misc]
    "sit-tiny-2": sit_tiny,
}


def preset(name: str) -> TrainConfig:
    """The configuration of a preset. Raises UserError naming the nearest ones."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{close_matches(name, list(PRESETS))}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
