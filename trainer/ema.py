"""The exponential moving average of the weights, from which samples are drawn: θ̄ ← d θ̄ + (1 − d) θ after each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """A float32 copy of a model, updated with a few fused operations over all parameters at once."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model`, which has the same parameters; buffers are copied."""
        averaged: list[Tensor] = list(self.model.parameters())
        current = [parameter.detach().to(torch.float32) for parameter in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore; raises RuntimeError when names or shapes differ."""
        self.model.load_state_dict(state)
