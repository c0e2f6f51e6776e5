"""Gaussian diffusion in 1,000 steps with a learned variance, as DiT trains it (arXiv 2212.09748, section 3.1).

    q(x_t | x) = N(√ᾱ_t x, (1 − ᾱ_t) I),  ᾱ_t = ∏ (1 − β_s),  β linear from 10⁻⁴ to 0.02          (DDPM, 2006.11239)
    p(x_{t−1} | x_t) = N(μ_t(x_t, x̂), Σ),  ln Σ = v ln β_t + (1 − v) ln β̃_t          (Nichol and Dhariwal, 2102.09672)
    L = ‖ε̂ − ε‖² + KL(q(x_{t−1} | x_t, x) ‖ p), the second in bits a dimension and with ε̂ held fixed, so that it
        trains the variance only; at t = 0 it is the negative log-likelihood of x in bins of 2/255

The model's output holds ε̂ in its first C channels and 2v − 1 in its last C. Steps are numbered from 0, as the model is
given them. The tables are float64, everything computed from data is float32.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.schema import LossConfig

N_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
HALF_BIN = 1 / 255
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A diffusion in K steps, tables float64 (K,)."""

    timesteps: Tensor  # int64 (K,), those of the 1,000 that it visits, ascending
    alphas_bar: Tensor
    log_betas: Tensor  # the upper end of the learned variance
    log_posterior_variances: Tensor  # the lower end, ln β̃_t
    of_x: Tensor  # the posterior mean is of_x · x + of_x_t · x_t (DDPM, equation 7)
    of_x_t: Tensor


_schedules: dict[tuple[int, torch.device], Schedule] = {}  # torch.compile reads a dict, and ignores functools.cache


def schedule(n_steps: int, device: torch.device) -> Schedule:
    """The diffusion that visits `n_steps` of the 1,000 steps at an even stride, both ends included.

    Its β are such that ᾱ is the whole diffusion's at the steps visited (2102.09672, section 4). β̃ = β (1 − ᾱ_{t−1}) /
    (1 − ᾱ_t) is zero at t = 0, where the next step's stands in. Made once for a device.
    """
    if (n_steps, device) not in _schedules:
        _schedules[n_steps, device] = _make_schedule(n_steps, device)
    return _schedules[n_steps, device]


def _make_schedule(n_steps: int, device: torch.device) -> Schedule:
    stride = (N_STEPS - 1) / max(1, n_steps - 1)
    # Added up, not multiplied, so that rounding picks the very steps of the published sampler.
    visited = [round(at) for at in itertools.accumulate([stride] * (n_steps - 1), initial=0.0)]
    alphas_bar = (1 - torch.linspace(BETA_FIRST, BETA_LAST, N_STEPS, dtype=torch.float64)).cumprod(0)[visited]
    before = F.pad(alphas_bar[:-1], (1, 0), value=1.0)
    betas = 1 - alphas_bar / before
    posterior_variances = betas * (1 - before) / (1 - alphas_bar)
    posterior_variances[0] = posterior_variances[1] if n_steps > 1 else betas[0]
    return Schedule(
        timesteps=torch.tensor(visited, device=device),
        alphas_bar=alphas_bar.to(device),
        log_betas=betas.log().to(device),
        log_posterior_variances=posterior_variances.log().to(device),
        of_x=(betas * before.sqrt() / (1 - alphas_bar)).to(device),
        of_x_t=((1 - betas).sqrt() * (1 - before) / (1 - alphas_bar)).to(device),
    )


@dataclass(frozen=True, kw_only=True)
class Normal:
    """A diagonal normal distribution over x_{t−1} (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


def posterior(x: Tensor, x_t: Tensor, index: Tensor, of: Schedule) -> Normal:
    """q(x_{t−1} | x_t, x) at places `index` int64 (B,) of the schedule."""
    mean = _at(of.of_x, index, x) * x + _at(of.of_x_t, index, x) * x_t
    return Normal(mean=mean, log_variance=_at(of.log_posterior_variances, index, x))


def reverse(output: Tensor, x_t: Tensor, index: Tensor, of: Schedule) -> Normal:
    """p(x_{t−1} | x_t) by the model's output (B, 2C, H, W), in x_t's precision."""
    noise, interpolation = output.to(x_t.dtype).chunk(2, dim=1)
    signal, deviation = _amplitudes(of, index, x_t)
    x = (x_t - deviation * noise) / signal
    share = (interpolation + 1) / 2
    high, low = (_at(table, index, x_t) for table in (of.log_betas, of.log_posterior_variances))
    return Normal(mean=posterior(x, x_t, index, of).mean, log_variance=share * high + (1 - share) * low)


def mean_square_loss(output: Tensor, noise: Tensor) -> Tensor:
    """‖ε̂ − ε‖², mean over all but the batch axis, float32 (B,)."""
    return (output.float().chunk(2, dim=1)[0] - noise.float()).square().flatten(1).mean(1)


def variational_loss(output: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The bound's term of step t int64 (B,) in bits a dimension, float32 (B,); no gradient by the predicted noise."""
    x, x_t = x.float(), x_t.float()
    noise, interpolation = output.float().chunk(2, dim=1)
    whole = schedule(N_STEPS, x.device)
    true = posterior(x, x_t, t, whole)
    model = reverse(torch.cat([noise.detach(), interpolation], dim=1), x_t, t, whole)
    divergence = 0.5 * (
        model.log_variance
        - true.log_variance
        - 1
        + (true.log_variance - model.log_variance).exp()
        + (true.mean - model.mean).square() * (-model.log_variance).exp()
    )
    first = (t == 0).reshape(-1, *[1] * (x.dim() - 1))
    nats = torch.where(first, -_log_likelihood_of_bin(x, model), divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood_of_bin(x: Tensor, normal: Normal) -> Tensor:
    """ln of the probability of the bin around x, as if x were 8-bit pixels in [−1, 1] (DDPM, equation 13).

    Latents are no pixels; DiT was trained so all the same, and so are its variances.
    """
    centred, per_std = x - normal.mean, (-0.5 * normal.log_variance).exp()
    above, below = (_normal_cdf(per_std * (centred + side)) for side in (HALF_BIN, -HALF_BIN))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=SMALLEST_PROBABILITY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the public loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _amplitudes(of: Schedule, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(√ᾱ, √(1 − ᾱ)), subtracted in float64: in float32, 1 − ᾱ would be off by a thousandth at the first step."""
    return _at(of.alphas_bar.sqrt(), index, like), _at((1 - of.alphas_bar).sqrt(), index, like)


def _at(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Entries of a float64 table for each sample, in the dtype of `like` and to be broadcast over it."""
    return table[index].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


# ---- the objective, as `objectives.Objective` describes it ------------------------------------------------------

data_time = False
each_slope_guided = False


def draw_times(uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
    """Steps int64 (B,), each of the 1,000 equally likely."""
    return (uniform * N_STEPS).long()


def perturb(x: Tensor, noise: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """x_t = √ᾱ_t x + √(1 − ᾱ_t) ε."""
    signal, deviation = _amplitudes(schedule(N_STEPS, x.device), t, x)
    return signal * x + deviation * noise


def denoising_loss(output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """Mean square of the noise plus the variational term, float32 (B,)."""
    return mean_square_loss(output, noise) + variational_loss(output, x, x_t, t)


def velocity(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output itself."""
    return output


def unit_times(t: Tensor) -> Tensor:
    """t / 1000, in [0, 1)."""
    return t / N_STEPS


def model_times(unit: Tensor) -> Tensor:
    """The step int64 (B,) that holds t, the last one for 1."""
    return (unit * N_STEPS).long().clamp(max=N_STEPS - 1)
