"""Recipes: a preset is a function that returns the whole configuration, model, optimisation and sampling together.

    {sit,dit}-{s,b,l,xl}-{2,4,8}[-512][-vanilla]        REPA, or the same without alignment
    {sit,dit}-{b,l,xl}-1[-vanilla]                      for latents of 16×16 (autoencoders of factor 16)
    sit-{b,l,xl}-2-reg                                  REG
    lightningdit-{b,xl}-1                               LightningDiT, without alignment
    rit-xl-1, ditdh-{s,xl}-1                            RiT and RAE, whose latents are an encoder's features
    sit-tiny-2, dit-tiny-2

Sizes are DiT's (Peebles and Xie, arXiv 2212.09748, table 1), which SiT took over (Ma et al., arXiv 2401.08740).
Training is REPA's (Yu et al., arXiv 2410.06940, section 4.1 and appendix D): linear path, velocity and uniform t for
SiT, 1,000 steps with learned variance for DiT; λ = 0.5; AdamW at 1e-4, global batch 256, EMA 0.9999; 400,000 steps.
Hidden states are aligned after block 8 for L and XL and after block 4 for B, as published. S has no published setting;
a third of its 12 blocks is block 4, as for B. `-vanilla` is the same without alignment (λ = 0); it reads no features.

Sampling is that of the published figures. SiT: Euler–Maruyama in 250 steps, the last from t = 0.04, without guidance
(REPA, tables 2 and 3); with `--guidance 1.8` it is that of table 4, whose guidance acts for t ≤ 0.7. DiT: ancestral
sampling in 250 steps without guidance; with `--guidance 1.5` it is that of DiT's table 2, on the first three channels.

`-512` is for stores at 512 px: latents of 64×64, features of 32×32 tokens (DINOv2 at 448 px). Its settings are those at
256 px; which guidance REPA's figures at 512 px were drawn with is not known here.

Generated images have labels drawn at random, as the public scripts of REPA, DiT, REG and LightningDiT draw them; those
of RAE's `ditdh-…` and of RiT take every class equally often.

Labels are dropped once, with probability 0.1, as the paper says. (With `--legacy`, which it keeps for its early runs,
the public script drops them twice, 19 % in all.)

`-reg` (arXiv 2507.01467) is SiT's recipe with the class token in the sequence: its denoising loss has weight 0.03, and
it is aligned with the patches. `--guidance 2.3` draws as the published figures with guidance were drawn: image and
class token at 2.3, for t ≤ 0.85.

`lightningdit` (arXiv 2501.01423): logit-normal times, the velocity's direction counted with weight 1, AdamW at 2e-4
with β₂ = 0.95, global batch 1024, 64 epochs. Sampling: Euler in 249 steps, shifted towards the noise by 1 / 0.3.
Guidance acts on the first three channels, and as published for 64 epochs for t ≤ 0.9, with `--guidance 10`. (For 800
epochs it was 6.7, for t ≤ 0.875.)

`rit` and `ditdh` learn features (`--data.latents features/NAME`): noise levels are logit-normal and shifted by
√(dimension / 4096), 4.90 for DINOv2-S and 6.93 for DINOv2-B at 256 px, in training and sampling.

`rit-xl-1` is RiT's XL (arXiv 2605.21981), on DINOv2-S with registers: it predicts x, and the class token with weight
0.2; AdamW at 3e-4 with β₂ = 0.95 after a warm-up of 5 epochs, global batch 1536, 800 epochs. Sampling: Heun in 25
steps, the last of which is Euler's. The published figures are `--protocol rit` and `rit-unguided`: both with
`--class-noise mean`, the one with `--guidance 3.7`.

`ditdh` is RAE's DiT^DH, on DINOv2-B with registers: AdamW at 2e-4 with β₂ = 0.95, which falls to 2e-5 over epochs 40 to
800, global batch 1024, EMA 0.9995, float32; 80 epochs. Sampling: Euler at 50 points, the last of which is level 0.001
before the shift. The published figure with guidance is `--guidance 1.42 --weaker RUN`, of a ditdh-s-1 after 14 epochs.
(Times are cut off at 0.999 before the shift, which logit-normal draws do not reach here.)

Patch 1 has REPA's settings, and the guidance interval of REPA-E's figures (arXiv 2504.10483), t ≤ 0.75.

`sit-tiny-2` and `dit-tiny-2` are for the demo and for tests on a CPU: a few minutes on two cores, at any resolution.
They are no published models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from storage.base.errors import UserError
from storage.base.options import close_matches
from trainer.config.optim import OptimConfig
from trainer.config.sample import SampleConfig
from trainer.config.schema import (
    PRESET_NAMES,
    CheckpointConfig,
    DataConfig,
    Kind,
    LogConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
)
from trainer.config.tree import override

# size: (depth, width, heads, block aligned)
SIZES = {"s": (12, 384, 6, 4), "b": (12, 768, 12, 4), "l": (24, 1024, 16, 8), "xl": (28, 1152, 16, 8)}
PATCHES = (2, 4, 8)
IMAGENET = 1_281_167  # images of its training set
LARGE = ("b", "l", "xl")  # sizes that the methods after REPA were published at
SAMPLING = {
    "sit": SampleConfig(sampler="sde", steps=250, guidance=1.0, guidance_high=0.7, labels="random"),
    "dit": SampleConfig(sampler="ddpm", steps=250, guidance=1.0, guidance_channels=3, labels="random"),
}


def published(name: str, kind: Kind, size: str, patch: int, resolution: int, aligned: bool) -> TrainConfig:
    """SiT or DiT with REPA's published settings, or the vanilla model beside it."""
    depth, width, heads, align_block = SIZES[size]
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        model=ModelConfig(kind=kind, depth=depth, width=width, heads=heads, patch=patch, align_block=(align_block,)),
        loss=LossConfig(projection_weight=(0.5 if aligned else 0.0,)),
        data=DataConfig(resolution=resolution),
        sample=SAMPLING[kind],
    )


def patch_one(name: str, kind: Kind, size: str, aligned: bool) -> TrainConfig:
    """SiT or DiT for latents of 16×16, a token a pixel."""
    return override(
        published(name, kind, size, 1, 256, aligned), {"sample.guidance_high": 0.75} if kind == "sit" else {}
    )


def reg(name: str, size: str) -> TrainConfig:
    """SiT with the class token in the sequence."""
    changes = {"model.class_token": True, "sample.guidance_high": 0.85}
    return override(published(name, "sit", size, 2, 256, aligned=True), changes)


def lightningdit(name: str, size: str) -> TrainConfig:
    """LightningDiT with its published settings."""
    depth, width, heads, align_block = SIZES[size]
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        batch=1024,
        steps=80_000,  # 64 epochs of ImageNet
        model=ModelConfig(
            kind="lightningdit", depth=depth, width=width, heads=heads, patch=1, align_block=(align_block,)
        ),
        loss=LossConfig(time_sampling="logit-normal", direction_weight=1.0, projection_weight=(0.0,)),
        data=DataConfig(resolution=256),
        optim=OptimConfig(lr=2e-4, beta2=0.95),
        sample=SampleConfig(
            sampler="ode", steps=249, shift=1 / 0.3, guidance_high=0.9, guidance_channels=3, labels="random"
        ),
    )


def rit(name: str) -> TrainConfig:
    """RiT with its published settings."""
    depth, width, heads, _ = SIZES["xl"]
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        batch=1536,
        steps=800 * IMAGENET // 1536,
        model=ModelConfig(
            kind="rit", depth=depth, width=width, heads=heads, patch=1, qk_norm=True, class_token=True, context=32,
            context_block=9,
        ),
        loss=LossConfig(time_sampling="logit-normal", time_shift=0.0, class_weight=0.2, projection_weight=(0.0,)),
        data=DataConfig(resolution=256),
        optim=OptimConfig(lr=3e-4, beta2=0.95, warmup=5 * IMAGENET // 1536),
        sample=SampleConfig(
            sampler="ode", steps=25, heun=True, shift=0.0, guidance_low=0.02, guidance_high=0.9
        ),
    )  # fmt: skip


def ditdh(name: str, size: str) -> TrainConfig:
    """RAE's DiT^DH with its published settings."""
    depth, width, heads, _ = SIZES[size]
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        batch=1024,
        steps=80 * IMAGENET // 1024,
        ema_decay=0.9995,
        precision="fp32",
        model=ModelConfig(
            kind="ditdh", depth=depth, width=width, heads=heads, patch=1, align_block=(SIZES[size][3],),
            head_width=2048, head_depth=2, head_heads=16,
        ),
        loss=LossConfig(time_sampling="logit-normal", time_shift=0.0, projection_weight=(0.0,)),
        data=DataConfig(resolution=256),
        optim=OptimConfig(
            lr=2e-4, beta2=0.95, decay="linear", decay_from=40 * IMAGENET // 1024, decay_until=800 * IMAGENET // 1024,
            final_lr=2e-5,
        ),
        sample=SampleConfig(sampler="ode", steps=49, shift=0.0, end=0.001),
    )  # fmt: skip


def tiny(name: str, kind: Kind) -> TrainConfig:
    """A model of about a million parameters that learns the demo's digits on two CPU cores."""
    sample = SampleConfig(sampler="ode" if kind == "sit" else "ddpm", steps=50, guidance=2.5)
    return TrainConfig(
        preset=name,
        run=Path("runs") / name,
        steps=1000,
        batch=32,
        ema_decay=0.99,
        model=ModelConfig(kind=kind, depth=4, width=128, heads=4, patch=2, align_block=(2,), projector_width=256),
        optim=OptimConfig(lr=2e-3),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=10),
        sample=sample,
    )


def _all_presets() -> dict[str, Callable[[], TrainConfig]]:
    kinds: tuple[Kind, ...] = ("sit", "dit")
    presets: dict[str, Callable[[], TrainConfig]] = {}
    for kind in kinds:
        for size in SIZES:
            for patch in PATCHES:
                for resolution in (256, 512):
                    for aligned in (True, False):
                        name = f"{kind}-{size}-{patch}{'-512' * (resolution == 512)}{'-vanilla' * (not aligned)}"
                        presets[name] = partial(published, name, kind, size, patch, resolution, aligned)
        for size in LARGE:
            for aligned in (True, False):
                name = f"{kind}-{size}-1{'-vanilla' * (not aligned)}"
                presets[name] = partial(patch_one, name, kind, size, aligned)
        presets[f"{kind}-tiny-2"] = partial(tiny, f"{kind}-tiny-2", kind)
    for size in LARGE:
        presets[f"sit-{size}-2-reg"] = partial(reg, f"sit-{size}-2-reg", size)
    for size in ("b", "xl"):  # L/1 was not published
        presets[f"lightningdit-{size}-1"] = partial(lightningdit, f"lightningdit-{size}-1", size)
    presets["rit-xl-1"] = partial(rit, "rit-xl-1")
    for size in ("s", "xl"):
        presets[f"ditdh-{size}-1"] = partial(ditdh, f"ditdh-{size}-1", size)
    return presets


PRESETS = _all_presets()


def preset(name: str) -> TrainConfig:
    """The configuration of a preset. Raises UserError naming the nearest ones."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{close_matches(name, list(PRESETS))}; there are {PRESET_NAMES}")
    return PRESETS[name]()
