"""The exponential moving average of the weights, from which samples are drawn: θ̄ ← d θ̄ + (1 − d) θ after each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from trainer.ranks.parallel import load_state, local

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A float32 copy of a model, updated with one fused operation over all parameters; sharded where the model is."""

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: M) -> None:
        """Move towards `model`, which has the same parameters (and shards); buffers are copied."""
        averaged = [local(parameter) for parameter in self.model.parameters()]
        current = [local(parameter).detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore whole tensors; raises RuntimeError when names or shapes differ."""
        load_state(self.model, state)
