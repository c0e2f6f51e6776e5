"""What is minimised: an objective for each kind of model.

An objective is a module with the functions of `Objective`, and two facts for the sampler. The training step
draws the numbers and calls it, so it knows no objective by name; to add one, write the module and its line in
`OBJECTIVES`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trainer.config.schema import LossConfig
from trainer.objectives import dit, lightningdit, rae, rit, sit


class Objective(Protocol):
    """x, noise and x_t are (B, C, H, W), t is (B,) of the objective's own kind, output is the model's."""

    data_time: bool  # a flow from noise (0) to image (1), whose velocity is dx/dt in that direction
    each_slope_guided: (
        bool  # whether guidance's interval is open and asked of each slope, not of a step (`sampling.py`)
    )

    def draw_times(self, uniform: Tensor, normal: Tensor, config: LossConfig) -> Tensor:
        """What the model is given as t, from draws (B,) of both kinds, of which one is used."""

    def perturb(self, x: Tensor, noise: Tensor, t: Tensor, config: LossConfig) -> Tensor:
        """What the model is given as x_t."""

    def denoising_loss(
        self, output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, config: LossConfig
    ) -> Tensor:
        """Each sample's loss, float32 (B,)."""

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt of a flow, by the model's output; what a sampler of another kind takes, as it is."""

    def unit_times(self, t: Tensor) -> Tensor:
        """t on a common scale from image (0) to noise (1), for logs and for the interval of guidance."""

    def model_times(self, unit: Tensor) -> Tensor:
        """What the model is given as t at times (B,) on that scale; the inverse of `unit_times`."""


OBJECTIVES: dict[str, Objective] = {"sit": sit, "dit": dit, "lightningdit": lightningdit, "rit": rit, "ditdh": rae}
