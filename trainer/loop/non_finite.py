"""Steps whose loss or gradient is not finite: left out, named, and counted against a budget.

The step itself decides on the device and changes no weight (`step.py`); here is what the host makes of it when the
numbers arrive. Every rank sees the same numbers, so every rank counts alike and stops at the same step.

Under fp16 a finite loss whose scaled gradient overflows is how the loss scale finds its size; it is named and not
counted, unless the scale has fallen below 1 and is no excuse any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.loop.losses import Losses
from trainer.loop.step import StepNumbers
from trainer.ranks.world import World


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or gradient that is not finite; the message names the last one and its rows."""


@dataclass
class NonFiniteSteps:
    """How many steps were left out, over the whole run."""

    budget: int
    skipped: int = 0

    def leave_out(
        self, step: int, numbers: StepNumbers, losses: Losses, rows: Tensor, world: World, loss_scale: float
    ) -> str:
        """Count a step and return what to print; every rank must call it. Raises NonFiniteError beyond the budget."""
        denoising, norm, *alignments = numbers.losses.tolist()
        losses_text = f"denoising loss {denoising:.4g}, gradient norm {norm:.4g}"
        if alignments:
            losses_text += f", alignment {', '.join(f'{value:.4g}' for value in alignments)}"
        if len(losses.class_denoising):
            losses_text += f", class token's {numbers.class_denoising.item():.4g}"
        finite = losses.of_samples().isfinite()
        bad_rows = [row for row in world.gather(torch.where(finite, -1, rows)).tolist() if row >= 0]
        message = f"step {step}: {losses_text}; rows {bad_rows or world.gather(rows).tolist()}"
        if not bad_rows and loss_scale > 1:
            return f"{message}; left out, the loss scale is now {loss_scale:g}"
        self.skipped += 1
        if self.skipped > self.budget:
            raise NonFiniteError(
                f"{message}; nothing was updated. Such steps: {self.skipped}, --max-skipped {self.budget}; "
                "lower --optim.lr, try --precision fp32, or look at these rows; the checkpoints are as they were"
            )
        return f"{message}; left out, {self.skipped} of at most {self.budget} (--max-skipped)"
