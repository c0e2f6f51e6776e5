"""RAE's flow matching (arXiv 2510.11690): SiT's, but for uniform times, which end at 0.999 before they are shifted.

Logit-normal times, as published, are cut off there too; our draws do not reach it (`random_keys.py`).
"""

from __future__ import annotations

from torch import Tensor

from trainer.config.schema import LossConfig
from trainer.objectives.sit import (
    data_time,
    denoising_loss,
    each_slope_guided,
    model_times,
    perturb,
    sample_times,
    shifted,
    unit_times,
    velocity,
)

__all__ = [
    "data_time", "denoising_loss", "draw_times", "each_slope_guided", "model_times", "perturb",
    "unit_times", "velocity",
]  # fmt: skip
LAST_TIME = 0.999  # before the shift


def draw_times(uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
    """Noise levels float32 (B,), shifted."""
    return shifted(sample_times(LAST_TIME * uniform, normal, config.time_sampling, "linear"), config.time_shift)
