"""Stochastic interpolants between image (t = 0) and noise (t = 1), as in SiT (arXiv 2401.08740, section 2).

x_t = α(t) x + σ(t) ε            v(x_t, t) = α'(t) x + σ'(t) ε
linear   α = 1 − t               σ = t
cosine   α = cos(π t / 2)        σ = sin(π t / 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.schema import LossConfig

Path = Literal["linear", "cosine"]
TimeSampling = Literal["uniform", "logit-normal", "lognormal"]


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """α, σ and their derivatives at some t, each of t's shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(t: Tensor, path: Path) -> Coefficients:
    """α(t), σ(t), α'(t), σ'(t)."""
    if path == "linear":
        one = torch.ones_like(t)
        return Coefficients(alpha=1 - t, sigma=t, d_alpha=-one, d_sigma=one)
    assert path == "cosine", path
    angle = t * (math.pi / 2)
    sin, cos = angle.sin(), angle.cos()
    return Coefficients(alpha=cos, sigma=sin, d_alpha=-math.pi / 2 * sin, d_sigma=math.pi / 2 * cos)


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """(x_t, velocity), each of x's shape (B, …), at times t (B,)."""
    at = coefficients(t.reshape(-1, *[1] * (x.dim() - 1)), path)
    return at.alpha * x + at.sigma * noise, at.d_alpha * x + at.d_sigma * noise


def sample_times(uniform: Tensor, normal: Tensor, sampling: TimeSampling, path: Path) -> Tensor:
    """Times (B,) in [0, 1) from draws `uniform` and `normal` (B,), of which one is used.

    logit-normal: ln σ ~ N(0, 1), and t such that σ(t)/α(t) = σ on the path, as in REPA's public loss; on the linear
    path that is logit(t) ~ N(0, 1). (EDM's own ln σ, arXiv 2206.00364, has mean −1.2 and deviation 1.2.)
    """
    if sampling == "uniform":
        return uniform
    sigma = normal.exp()
    return sigma / (1 + sigma) if path == "linear" else 2 / math.pi * torch.atan(sigma)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Noise levels S_s(t) = s t / (1 + (s − 1) t) of noise levels t, of t's shape; t itself where s is 1.

    For s > 1 they lie closer to the noise (arXiv 2403.03206, eq. 23). The same map of the data's times 1 − t is S_1/s.
    Computed in float64, so that none of float32 lies above 1, and 1 is mapped to itself.
    """
    if shift == 1:
        return t
    assert shift > 0, shift
    exact = t.double()
    return (shift * exact / (1 + (shift - 1) * exact)).to(t.dtype)


def velocity_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean square over all but the batch axis, float32 (B,)."""
    return (predicted.float() - velocity.float()).square().flatten(1).mean(1)


def direction_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """1 − cosine over the channels (axis 1), mean over places, float32 (B,) (LightningDiT, arXiv 2501.01423)."""
    cosine = F.cosine_similarity(predicted.float(), velocity.float(), dim=1)
    return (1 - cosine).flatten(1).mean(1)


def flow_loss(predicted: Tensor, velocity: Tensor, config: LossConfig) -> Tensor:
    """The velocity's mean square, and its direction where that counts, float32 (B,)."""
    loss = velocity_loss(predicted, velocity)
    if not config.direction_weight:
        return loss
    return loss + config.direction_weight * direction_loss(predicted, velocity)


def score_from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
    """∇ log p_t(x_t) (B, …) from the velocity (SiT, equation 9).

    With r = α/α':  s = (r v − x_t) / (σ² − r σ' σ). Singular at t = 0, which no sampler asks for.
    """
    at = coefficients(t.reshape(-1, *[1] * (x_t.dim() - 1)), path)
    ratio = at.alpha / at.d_alpha
    return (ratio * velocity - x_t) / (at.sigma**2 - ratio * at.d_sigma * at.sigma)


# ---- the objective, as `objectives.Objective` describes it ------------------------------------------------------

data_time = False
each_slope_guided = False


def draw_times(uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
    """Times float32 (B,) in [0, 1], shifted."""
    return shifted(sample_times(uniform, normal, config.time_sampling, config.path), config.time_shift)


def perturb(x: Tensor, noise: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """x_t on the path."""
    return interpolate(x, noise, t, config.path)[0]


def denoising_loss(output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """Mean square of the velocity, and what its direction counts, float32 (B,)."""
    return flow_loss(output, interpolate(x, noise, t, config.path)[1], config)


def velocity(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output itself."""
    return output


def unit_times(t: Tensor) -> Tensor:
    """t itself."""
    return t


def model_times(unit: Tensor) -> Tensor:
    """t itself."""
    return unit
