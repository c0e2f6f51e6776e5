"""The settings of drawing images; `objectives/sampling.py` does what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from storage.base.errors import UserError
from trainer.config.declaring import at_least, option

AS_IMAGE = -1.0  # of a class token's guidance scale and interval


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How `trainer generate` draws images from this run; saved with it, and may be overridden there."""

    sampler: Literal["sde", "ode", "ddpm"] = option(
        "sde", "SiT: Euler–Maruyama (sde) or Euler (ode); DiT: ancestral sampling (ddpm)", free=True
    )
    steps: int = option(250, "steps of the sampler", free=True)
    heun: bool = option(False, "Heun's correction of the ode sampler, which calls the model twice a step", free=True)
    shift: float = option(
        1.0,
        "s of the noise levels s·t / (1 + (s − 1)·t) that a sampler visits; above 1 more of them near noise; 0: as "
        "--loss.time-shift",
        free=True,
    )
    end: float = option(
        0.0, "noise level, before the shift, at which the ode sampler ends and leaves what noise there is", free=True
    )
    guidance: float = option(
        1.0,
        "classifier-free guidance scale, of a class token too unless --sample.guidance-class says; 1: none",
        free=True,
    )
    guidance_low: float = option(0.0, "guidance applies from this t, 0 (image) to 1 (noise)", free=True)
    guidance_high: float = option(1.0, "guidance applies up to this t", free=True)
    guidance_channels: int = option(0, "latent channels that guidance applies to, the first ones; 0: all", free=True)
    labels: Literal["balanced", "random", "uniform"] = option(
        "balanced",
        "classes of generated images: each in turn, or drawn at random (uniform is the older word)",
        free=True,
    )
    guidance_class: float = option(
        AS_IMAGE,
        "guidance scale of the class token where guidance applies; 0: none, -1: that of --sample.guidance, as "
        "published",
        free=True,
        before=0.0,
    )
    guidance_class_low: float = option(AS_IMAGE, "the class token's own --sample.guidance-low; -1: the same", free=True)
    guidance_class_high: float = option(
        AS_IMAGE, "the class token's own --sample.guidance-high; -1: the same", free=True
    )
    class_noise: Literal["own", "mean"] = option(
        "own",
        "rit: what the class token starts from, draws of its own or the mean of the latents' over their places",
        free=True,
    )

    def __post_init__(self) -> None:
        at_least(self, "sample", "steps", 2 if self.sampler == "sde" else 1)
        at_least(self, "sample", "guidance", 1)
        at_least(self, "sample", "guidance_channels", 0)
        if self.guidance_class != AS_IMAGE and not 0 <= self.guidance_class < math.inf:
            raise UserError(
                "--sample.guidance-class must be at least 0, or -1 for that of --sample.guidance, got "
                f"{self.guidance_class}"
            )
        if self.sampler == "ddpm" and self.steps > 1000:
            raise UserError(f"--sample.steps is at most 1000 with --sample.sampler ddpm, got {self.steps}")
        if self.heun and self.sampler != "ode":
            raise UserError(f"--sample.heun true goes with --sample.sampler ode, not {self.sampler}")
        if not 0 <= self.shift < math.inf:
            raise UserError(f"--sample.shift must be positive and finite, or 0, got {self.shift}")
        if not 0 <= self.end < 1 or (self.end and self.sampler != "ode"):
            raise UserError(
                "--sample.end must be in [0, 1), and 0 but for --sample.sampler ode, "
                f"got {self.end} with {self.sampler}"
            )
        for of, (low, high) in (("", (self.guidance_low, self.guidance_high)), ("class-", self.class_interval)):
            if not 0 <= low <= high <= 1:
                raise UserError(
                    f"--sample.guidance-{of}low and --sample.guidance-{of}high must be an interval inside [0, 1], "
                    f"got {low} and {high}"
                )

    @property
    def class_interval(self) -> tuple[float, float]:
        """The noise levels at which the class token is guided."""
        low, high = self.guidance_class_low, self.guidance_class_high
        return (self.guidance_low if low == AS_IMAGE else low, self.guidance_high if high == AS_IMAGE else high)

    @property
    def class_guidance(self) -> float:
        """The class token's guidance scale where guidance applies; 0 or 1: none."""
        return self.guidance if self.guidance_class == AS_IMAGE else self.guidance_class
