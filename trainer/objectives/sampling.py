"""Drawing images: Euler (or Heun) for the probability-flow ODE, Euler–Maruyama for the reverse SDE, DDPM's chain.

    dx = v(x, t) dt                                       ode, t from 1 to 0
    dx = [v(x, t) − ½ w(t) s(x, t)] dt + √w(t) dW̄         sde, diffusion w(t) = 2 t (SiT, arXiv 2401.08740, eq. 4)
    x_{t−1} ~ p(x_{t−1} | x_t)                            ddpm, on evenly strided steps (`objectives/dit.py`)

The SDE runs from t = 1 to t = 0.04 in equal steps and makes its last step, to 0, without noise, as the published
figures were sampled; so does the chain. Euler may end before 0 (`--sample.end`), as RAE's does.

Classifier-free guidance o = o_∅ + s·(o_y − o_∅) of the model's output applies for t in an interval (arXiv 2404.07724);
outside it and at scale 1 the batch is not doubled. The ends of the interval count, and a step's start decides for both
of Heun's slopes, as in REPA's sampler; RiT's asks each slope, and an end counts only where it is 0 or 1. A class token
has a scale and an interval of its own, if the image is guided at all (REG, RiT). With a weaker model, o_∅
is what that says of the same label (autoguidance, arXiv 2406.02507). State is float64; the model sees its own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.sample import SampleConfig
from trainer.objectives import Objective, sit
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
    objective: Objective = sit
    weaker: Predict | None = None  # what guidance leads away from, instead of the model without label

    def velocity(self, state: Tensor, t: float, of_step: float) -> Tensor:
        """dx/dt float64 at a state float64 and noise level t, of a step that begins at `of_step`."""
        asked_of = t if self.objective.each_slope_guided else of_step
        times = torch.full((len(state),), t, dtype=self.dtype, device=state.device)
        if not self.objective.data_time:
            return self.objective.velocity(self.output(state, times, asked_of), state, times)
        times = 1 - times
        return -self.objective.velocity(self.output(state, times, asked_of), state, times.double())

    def output(self, state: Tensor, t: Tensor, unit_time: float) -> Tensor:
        """The model's output float64 at a state float64 and times (B,), guided where `unit_time` is in the interval.

        Each model is called once. Channels beyond those guided (a learned variance among them) are the conditional
        output's.
        """
        config = self.config
        scale = config.guidance if self._guides(unit_time, config.guidance_low, config.guidance_high) else 1.0
        of_class = class_scale(config) if self.class_width else 0.0
        of_class = of_class if self._guides(unit_time, *config.class_interval) else 0.0
        if scale == 1 and of_class in (0, 1):
            return self.predict(state.to(self.dtype), t, self.labels).double()
        conditional, other = self._both(state, t)
        n = state.shape[1] - self.class_width if self.class_width else config.guidance_channels or state.shape[1]
        beyond = _towards(other[:, n:], conditional[:, n:], of_class or 1.0)
        return torch.cat([_towards(other[:, :n], conditional[:, :n], scale), beyond], dim=1)

    def _both(self, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The output for the labels, and that which guidance leads away from."""
        x = state.to(self.dtype)
        if self.weaker is not None:
            return self.predict(x, t, self.labels).double(), self.weaker(x, t, self.labels).double()
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        conditional, other = self.predict(torch.cat([x, x]), torch.cat([t, t]), labels).double().chunk(2)
        return conditional, other

    def _guides(self, t: float, low: float, high: float) -> bool:
        return guides(self.objective, t, low, high)


def guides(objective: Objective, t: float, low: float, high: float) -> bool:
    """Whether guidance in an interval acts at a noise level t."""
    if objective.each_slope_guided:
        return (low < t or low == 0) and (t < high or high == 1)
    return low <= t <= high


def class_scale(config: SampleConfig) -> float:
    """The scale at which a class token is guided where its interval says so; 0 or 1: not at all."""
    return config.class_guidance if config.guidance > 1 else 0.0


def _towards(other: Tensor, conditional: Tensor, scale: float) -> Tensor:
    return conditional if scale == 1 else other + scale * (conditional - other)


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
    objective: Objective = sit,
    weaker: Predict | None = None,
) -> Tensor:
    """Latents float64 (B, C, …) from noise x (B, C, …) and labels int64 (B,), of a model of `objective`.

    `noise(i)` gives the draws of step i, so that a caller decides what each image's randomness is keyed by: none are
    asked for by ode, one fewer than there are steps by the others. `x.dtype` is what the model is called with.
    """
    drawing = Drawing(
        predict=predict, labels=labels, null_label=null_label, config=config, path=path, noise=noise, dtype=x.dtype,
        class_width=class_width, objective=objective, weaker=weaker,
    )  # fmt: skip
    return SAMPLERS[config.sampler](x.double(), drawing)


def _euler(state: Tensor, drawing: Drawing) -> Tensor:
    config = drawing.config
    for i, (t, t_next) in enumerate(itertools.pairwise(noise_levels(config))):
        slope = drawing.velocity(state, t, t)
        proposal = state + (t_next - t) * slope
        if config.heun and i < config.steps - 1:
            slope = (slope + drawing.velocity(proposal, t_next, t)) / 2
            proposal = state + (t_next - t) * slope
        state = proposal
    return state


def _euler_maruyama(state: Tensor, drawing: Drawing) -> Tensor:
    for i, (t, t_next) in enumerate(itertools.pairwise(noise_levels(drawing.config))):
        v = drawing.velocity(state, t, t)
        diffusion = 2 * t
        score = score_from_velocity(v, state, state.new_full((len(state),), t), drawing.path)
        state = state + (v - 0.5 * diffusion * score) * (t_next - t)
        if t_next > 0:
            state = state + (diffusion * (t - t_next)) ** 0.5 * drawing.noise(i).double()
    return state


def _ancestral(state: Tensor, drawing: Drawing) -> Tensor:
    n_steps = drawing.config.steps
    visited = schedule(n_steps, state.device)
    times = noise_levels(drawing.config)
    for i, place in enumerate(reversed(range(n_steps))):
        index = torch.full((len(state),), place, device=state.device)
        output = drawing.output(state, visited.timesteps[index], times[i])
        step = reverse(output, state, index, visited)
        state = step.mean
        if place > 0:
            state = state + (0.5 * step.log_variance).exp() * drawing.noise(i).double()
    return state


def noise_levels(config: SampleConfig) -> list[float]:
    """The levels that a sampler visits, from the noise to where it ends: one more than it has steps."""
    if config.sampler == "ddpm":
        return [*unit_times(schedule(config.steps, torch.device("cpu")).timesteps).flip(0).tolist(), 0.0]
    if config.sampler == "sde":
        even = torch.linspace(1, LAST_SDE_TIME, config.steps, dtype=torch.float64)
        return [*shifted(even, config.shift).tolist(), 0.0]
    even = torch.linspace(1, config.end, config.steps + 1, dtype=torch.float64)
    levels: list[float] = shifted(even, config.shift).tolist()
    return levels


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How often the model is asked for an image, and how often of these guidance asks a second time."""

    total: int
    guided: int


def calls_of(config: SampleConfig, objective: Objective, *, class_token: bool) -> Calls:
    """Counted over the levels that the sampler visits."""
    asked_of = []
    for i, (t, t_next) in enumerate(itertools.pairwise(noise_levels(config))):
        asked_of.append(t)
        if config.sampler == "ode" and config.heun and i < config.steps - 1:
            asked_of.append(t_next if objective.each_slope_guided else t)
    intervals = [(config.guidance_low, config.guidance_high)] if config.guidance > 1 else []
    if class_token and class_scale(config) not in (0, 1):
        intervals.append(config.class_interval)
    guided = sum(any(guides(objective, t, *interval) for interval in intervals) for t in asked_of)
    return Calls(total=len(asked_of), guided=guided)


SAMPLERS = {"ode": _euler, "sde": _euler_maruyama, "ddpm": _ancestral}
