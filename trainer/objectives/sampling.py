"""Drawing images: Euler (or Heun) for the probability-flow ODE, Euler–Maruyama for the reverse SDE, DDPM's chain.

    dx = v(x, t) dt                                       ode, t from 1 to 0
    dx = [v(x, t) − ½ w(t) s(x, t)] dt + √w(t) dW̄         sde, diffusion w(t) = 2 t (SiT, arXiv 2401.08740, eq. 4)
    x_{t−1} ~ p(x_{t−1} | x_t)                            ddpm, on evenly strided steps (`objectives/dit.py`)

The SDE runs from t = 1 to t = 0.04 in equal steps and makes its last step, to 0, without noise, as the published
figures were sampled; so does the chain. Classifier-free guidance o = o_∅ + s·(o_y − o_∅) of the model's output applies
for t in an interval (arXiv 2404.07724); outside it and at scale 1 the batch is not doubled. State is float64; the model
sees its own dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.sample import SampleConfig
from trainer.objectives.dit import reverse, schedule, unit_times
from trainer.objectives.sit import Path, score_from_velocity, shifted

LAST_SDE_TIME = 0.04
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, C, …), t (B,), y (B,)) → output (B, C or 2C, …)
Noise = Callable[[int], Tensor]  # number of the step → standard normal draws of x's shape


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a sampler works with. The last `class_width` numbers of a state (B, C·H·W + c) are its class token."""

    predict: Predict
    labels: Tensor  # int64 (B,)
    null_label: int
    config: SampleConfig
    path: Path
    noise: Noise
    dtype: torch.dtype  # what the model is called with
    class_width: int = 0
    data_time: bool = False  # the model is given 1 − t, and its output is −dx/dt

    def output(self, state: Tensor, t: Tensor, unit_time: float) -> Tensor:
        """The model's output float64 at a state float64 and times (B,), guided where `unit_time` is in the interval.

        The model is called once. Channels beyond those guided (a learned variance among them) are the conditional
        output's.
        """
        if self.data_time:
            return -dataclasses.replace(self, data_time=False).output(state, 1 - t, unit_time)
        config = self.config
        scale = config.guidance if config.guidance_low <= unit_time <= config.guidance_high else 1.0
        if scale == 1:
            return self.predict(state.to(self.dtype), t, self.labels).double()
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        output = self.predict(torch.cat([state, state]).to(self.dtype), torch.cat([t, t]), labels).double()
        conditional, unconditional = output.chunk(2)
        if self.class_width:
            n = state.shape[1] - self.class_width
            of_class = _towards(unconditional[:, n:], conditional[:, n:], config.class_guidance or 1.0)
        else:
            n = config.guidance_channels or state.shape[1]
            of_class = conditional[:, n:]
        return torch.cat([_towards(unconditional[:, :n], conditional[:, :n], scale), of_class], dim=1)


def _towards(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


def sample(
    predict: Predict,
    x: Tensor,
    labels: Tensor,
    null_label: int,
    config: SampleConfig,
    path: Path,
    noise: Noise,
    *,
    class_width: int = 0,
    data_time: bool = False,
) -> Tensor:
    """Latents float64 (B, C, …) from noise x (B, C, …) and labels int64 (B,).

    `noise(i)` gives the draws of step i, so that a caller decides what each image's randomness is keyed by: none are
    asked for by ode, one fewer than there are steps by the others. `x.dtype` is what the model is called with.
    """
    drawing = Drawing(
        predict=predict, labels=labels, null_label=null_label, config=config, path=path, noise=noise, dtype=x.dtype,
        class_width=class_width, data_time=data_time,
    )  # fmt: skip
    return SAMPLERS[config.sampler](x.double(), drawing)


def _euler(state: Tensor, drawing: Drawing) -> Tensor:
    config = drawing.config
    times = shifted(torch.linspace(1, 0, config.steps + 1, dtype=torch.float64), config.shift).tolist()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        # The start of a step decides on guidance for both slopes of Heun's correction, as in the published sampler.
        slope = drawing.output(state, _times(t, state, drawing), t)
        proposal = state + (t_next - t) * slope
        if config.heun and i < config.steps - 1:
            slope = (slope + drawing.output(proposal, _times(t_next, state, drawing), t)) / 2
            proposal = state + (t_next - t) * slope
        state = proposal
    return state


def _euler_maruyama(state: Tensor, drawing: Drawing) -> Tensor:
    config = drawing.config
    even = torch.linspace(1, LAST_SDE_TIME, config.steps, dtype=torch.float64)
    times = [*shifted(even, config.shift).tolist(), 0.0]
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = drawing.output(state, _times(t, state, drawing), t)
        diffusion = 2 * t
        score = score_from_velocity(v, state, state.new_full((len(state),), t), drawing.path)
        state = state + (v - 0.5 * diffusion * score) * (t_next - t)
        if t_next > 0:
            state = state + (diffusion * (t - t_next)) ** 0.5 * drawing.noise(i).double()
    return state


def _ancestral(state: Tensor, drawing: Drawing) -> Tensor:
    n_steps = drawing.config.steps
    visited = schedule(n_steps, state.device)
    times = unit_times(visited.timesteps).tolist()
    for i, place in enumerate(reversed(range(n_steps))):
        index = torch.full((len(state),), place, device=state.device)
        output = drawing.output(state, visited.timesteps[index], times[place])
        step = reverse(output, state, index, visited)
        state = step.mean
        if place > 0:
            state = state + (0.5 * step.log_variance).exp() * drawing.noise(i).double()
    return state


SAMPLERS = {"ode": _euler, "sde": _euler_maruyama, "ddpm": _ancestral}


def _times(t: float, state: Tensor, drawing: Drawing) -> Tensor:
    return torch.full((len(state),), t, dtype=drawing.dtype, device=state.device)
