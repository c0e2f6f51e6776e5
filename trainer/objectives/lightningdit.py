"""LightningDiT's flow matching (arXiv 2501.01423): a linear path in data time τ, from noise (0) to image (1).

x_τ = τ x + (1 − τ) ε            u = dx_τ/dτ = x − ε

τ is uniform, or the logistic function of a normal draw (`--loss.time-sampling logit-normal`, as published); the loss
may count the direction of u besides its length (`--loss.direction-weight 1`, as published).
"""

from __future__ import annotations

from torch import Tensor

from trainer.config.schema import LossConfig
from trainer.objectives import sit

data_time = True
each_slope_guided = False


def draw_times(uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
    """τ float32 (B,) in [0, 1], of shifted noise levels 1 − τ."""
    return sit.shifted(sit.sample_times(uniform, normal, config.time_sampling, "linear"), 1 / config.time_shift)


def perturb(x: Tensor, noise: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """x_τ on the path."""
    return sit.interpolate(noise, x, t, "linear")[0]


def denoising_loss(output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """Mean square of the velocity, and what its direction counts, float32 (B,)."""
    return sit.flow_loss(output, x - noise, config)


def velocity(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output itself."""
    return output


def unit_times(t: Tensor) -> Tensor:
    """1 − τ, from image (0) to noise (1)."""
    return 1 - t


def model_times(unit: Tensor) -> Tensor:
    """1 − t."""
    return 1 - unit
