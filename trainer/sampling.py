"""Drawing images: Euler (or Heun) for the probability-flow ODE, Euler–Maruyama for the reverse SDE.

    dx = v(x, t) dt                                       ODE, t from 1 to 0
    dx = [v(x, t) − ½ w(t) s(x, t)] dt + √w(t) dW̄         SDE, diffusion w(t) = 2 t (SiT, arXiv 2401.08740, eq. 4)

The SDE runs from t = 1 to t = 0.04 in equal steps and makes its last step, to 0, without noise, as the published
figures were sampled. Classifier-free guidance v = v_∅ + s·(v_y − v_∅) applies for t in an interval (arXiv 2404.07724);
outside it and at scale 1 the batch is not doubled. State is float64; the model sees its own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from storage.errors import UserError
from trainer.objectives.interpolant import Path, score_from_velocity

LAST_SDE_TIME = 0.04
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, …), t (B,), y (B,)) → velocity (B, …)
Noise = Callable[[int], Tensor]  # number of the step → standard normal draws (B, …)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Which sampler, how many steps, and how much guidance where."""

    sampler: Literal["sde", "ode"] = "sde"
    steps: int = 250
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    heun: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.sampler == "sde" else 1
        if self.steps < least:
            raise UserError(f"the {self.sampler} sampler needs at least {least} steps, got {self.steps}")
        if not self.guidance >= 1 or not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UserError(
                "guidance must be at least 1 and its interval lie in [0, 1], got "
                f"{self.guidance} in [{self.guidance_low}, {self.guidance_high}]"
            )
        if self.heun and self.sampler == "sde":
            raise UserError("heun is a correction of the ode sampler; use it with sampler ode")


def sample(
    velocity: Velocity, x: Tensor, y: Tensor, null_label: int, config: SamplerConfig, path: Path, noise: Noise
) -> Tensor:
    """Latents float64 (B, …) from noise x (B, …) and labels y int64 (B,).

    `noise(i)` gives the draws of SDE step i, so that a caller decides what each image's randomness is keyed by; the ODE
    asks for none. `x.dtype` is what the model is called with.
    """
    if config.sampler == "ode":
        return _euler(velocity, x, y, null_label, config)
    return _euler_maruyama(velocity, x, y, null_label, config, path, noise)


def _guides(config: SamplerConfig, t: float) -> bool:
    return config.guidance > 1 and config.guidance_low <= t <= config.guidance_high


def _guided(
    velocity: Velocity, x: Tensor, t: float, y: Tensor, null_label: int, guidance: float, dtype: torch.dtype
) -> Tensor:
    """The velocity float64 at state x float64, guided unless `guidance` is 1; the model is called once."""
    guide = guidance > 1
    inputs = torch.cat([x, x]) if guide else x
    labels = torch.cat([y, torch.full_like(y, null_label)]) if guide else y
    times = torch.full((len(inputs),), t, dtype=dtype, device=x.device)
    v = velocity(inputs.to(dtype), times, labels).double()
    if not guide:
        return v
    conditional, unconditional = v.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _euler(velocity: Velocity, x: Tensor, y: Tensor, null_label: int, config: SamplerConfig) -> Tensor:
    dtype, state = x.dtype, x.double()
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        # The start of a step decides for both slopes of Heun's correction, as in the published sampler.
        guidance = config.guidance if _guides(config, t) else 1.0
        slope = _guided(velocity, state, t, y, null_label, guidance, dtype)
        proposal = state + (t_next - t) * slope
        if config.heun and i < config.steps - 1:
            slope = (slope + _guided(velocity, proposal, t_next, y, null_label, guidance, dtype)) / 2
            proposal = state + (t_next - t) * slope
        state = proposal
    return state


def _euler_maruyama(
    velocity: Velocity, x: Tensor, y: Tensor, null_label: int, config: SamplerConfig, path: Path, noise: Noise
) -> Tensor:
    dtype, state = x.dtype, x.double()
    times = [*torch.linspace(1, LAST_SDE_TIME, config.steps, dtype=torch.float64).tolist(), 0.0]
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        guidance = config.guidance if _guides(config, t) else 1.0
        v = _guided(velocity, state, t, y, null_label, guidance, dtype)
        diffusion = 2 * t
        score = score_from_velocity(v, state, torch.full((len(state),), t, dtype=torch.float64, device=x.device), path)
        state = state + (v - 0.5 * diffusion * score) * (t_next - t)
        if t_next > 0:
            state = state + (diffusion * (t - t_next)) ** 0.5 * noise(i).double()
    return state
