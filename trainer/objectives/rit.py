"""RiT's flow matching: a linear path in data time τ, from noise (0) to image (1), and a model that predicts x itself.

    z = τ x + (1 − τ) ε            v = (x̂ − z) / max(1 − τ, 0.05)            L = mean ((x̂ − x) / max(1 − τ, 0.05))²

The loss is the velocity's, but for τ above 0.95. Noise levels 1 − τ are shifted (`--loss.time-shift`), then kept within
0.001 and 0.999.
"""

from __future__ import annotations

from torch import Tensor

from trainer.config.schema import LossConfig
from trainer.objectives import sit

LEAST_LEVEL = 0.05  # that a velocity is divided by
CUT = 0.001  # of noise levels, at both ends

data_time = True
each_slope_guided = True


def draw_times(uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
    """τ float32 (B,). What the published code cuts off the normal's tails our draws do not reach (`random_keys.py`)."""
    levels = sit.shifted(sit.sample_times(uniform, normal, config.time_sampling, "linear"), config.time_shift)
    return 1 - levels.clamp(CUT, 1 - CUT)


def perturb(x: Tensor, noise: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """z on the path."""
    return sit.interpolate(noise, x, t, "linear")[0]


def denoising_loss(output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """Mean square of x̂ − x over the squared noise level, float32 (B,)."""
    return sit.velocity_loss(output, x) / _levels(t.float()).square()


def velocity(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """(x̂ − z) / max(1 − τ, 0.05)."""
    return (output - x_t) / _levels(t).reshape(-1, *[1] * (x_t.dim() - 1))


def unit_times(t: Tensor) -> Tensor:
    """1 − τ, from image (0) to noise (1)."""
    return 1 - t


def model_times(unit: Tensor) -> Tensor:
    """1 − t."""
    return 1 - unit


def _levels(t: Tensor) -> Tensor:
    return (1 - t).clamp(min=LEAST_LEVEL)
