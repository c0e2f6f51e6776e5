"""Drawing images: Euler (or Heun) for the probability-flow ODE, Euler–Maruyama for the reverse SDE, DDPM's chain.

    dx = v(x, t) dt                                       ode, t from 1 to 0
    dx = [v(x, t) − ½ w(t) s(x, t)] dt + √w(t) dW̄         sde, diffusion w(t) = 2 t (SiT, arXiv 2401.08740, eq. 4)
    x_{t−1} ~ p(x_{t−1} | x_t)                            ddpm, on evenly strided steps (`objectives/diffusion.py`)

The SDE runs from t = 1 to t = 0.04 in equal steps and makes its last step, to 0, without noise, as the published
figures were sampled; so does the chain. Classifier-free guidance o = o_∅ + s·(o_y − o_∅) of the model's output applies
for t in an interval (arXiv 2404.07724); outside it and at scale 1 the batch is not doubled. State is float64; the model
sees its own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.config.schema import SampleConfig
from trainer.objectives.dit import reverse, schedule, unit_times
from trainer.objectives.sit import Path, score_from_velocity

LAST_SDE_TIME = 0.04
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, C, …), t (B,), y (B,)) → output (B, C or 2C, …)
Noise = Callable[[int], Tensor]  # number of the step → standard normal draws (B, C, …)


def sample(
    predict: Predict, x: Tensor, y: Tensor, null_label: int, config: SampleConfig, path: Path, noise: Noise
) -> Tensor:
    """Latents float64 (B, C, …) from noise x (B, C, …) and labels y int64 (B,).

    `noise(i)` gives the draws of step i, so that a caller decides what each image's randomness is keyed by: none are
    asked for by ode, one fewer than there are steps by the others. `x.dtype` is what the model is called with.
    """
    return SAMPLERS[config.sampler](predict, x, y, null_label, config, path, noise)


def _euler(
    predict: Predict, x: Tensor, y: Tensor, null_label: int, config: SampleConfig, path: Path, noise: Noise
) -> Tensor:
    dtype, state = x.dtype, x.double()
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        # The start of a step decides for both slopes of Heun's correction, as in the published sampler.
        scale = _scale_at(t, config)
        slope = _guided(predict, state, _times(t, x), y, null_label, scale, config, dtype)
        proposal = state + (t_next - t) * slope
        if config.heun and i < config.steps - 1:
            slope = (slope + _guided(predict, proposal, _times(t_next, x), y, null_label, scale, config, dtype)) / 2
            proposal = state + (t_next - t) * slope
        state = proposal
    return state


def _euler_maruyama(
    predict: Predict, x: Tensor, y: Tensor, null_label: int, config: SampleConfig, path: Path, noise: Noise
) -> Tensor:
    dtype, state = x.dtype, x.double()
    times = [*torch.linspace(1, LAST_SDE_TIME, config.steps, dtype=torch.float64).tolist(), 0.0]
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = _guided(predict, state, _times(t, x), y, null_label, _scale_at(t, config), config, dtype)
        diffusion = 2 * t
        score = score_from_velocity(v, state, _times(t, state), path)
        state = state + (v - 0.5 * diffusion * score) * (t_next - t)
        if t_next > 0:
            state = state + (diffusion * (t - t_next)) ** 0.5 * noise(i).double()
    return state


def _ancestral(
    predict: Predict, x: Tensor, y: Tensor, null_label: int, config: SampleConfig, path: Path, noise: Noise
) -> Tensor:
    dtype, state = x.dtype, x.double()
    visited = schedule(config.steps, x.device)
    times = unit_times(visited.timesteps).tolist()
    for i, place in enumerate(reversed(range(config.steps))):
        index = torch.full((len(x),), place, device=x.device)
        t = visited.timesteps[index]
        output = _guided(predict, state, t, y, null_label, _scale_at(times[place], config), config, dtype)
        step = reverse(output, state, index, visited)
        state = step.mean
        if place > 0:
            state = state + (0.5 * step.log_variance).exp() * noise(i).double()
    return state


SAMPLERS = {"ode": _euler, "sde": _euler_maruyama, "ddpm": _ancestral}


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, dtype=like.dtype, device=like.device)


def _scale_at(t: float, config: SampleConfig) -> float:
    return config.guidance if config.guidance_low <= t <= config.guidance_high else 1.0


def _guided(
    predict: Predict,
    state: Tensor,
    t: Tensor,
    y: Tensor,
    null_label: int,
    scale: float,
    config: SampleConfig,
    dtype: torch.dtype,
) -> Tensor:
    """The model's output float64 at a state float64, guided unless `scale` is 1; the model is called once.

    Channels beyond those guided (a learned variance among them) are the conditional output's.
    """
    if scale == 1:
        return predict(state.to(dtype), t, y).double()
    labels = torch.cat([y, torch.full_like(y, null_label)])
    output = predict(torch.cat([state, state]).to(dtype), torch.cat([t, t]), labels).double()
    conditional, unconditional = output.chunk(2)
    n = config.guidance_channels or state.shape[1]
    guided = unconditional[:, :n] + scale * (conditional[:, :n] - unconditional[:, :n])
    return torch.cat([guided, conditional[:, n:]], dim=1)
