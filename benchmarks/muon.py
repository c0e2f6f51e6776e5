"""Muon for any weight of two or more dimensions, in float32: of the trainings where steps are what is dear.

Each weight is seen as a matrix (out, in × kernel) and moved along the orthogonal factor of its momentum, so that all
directions move alike (K. Jordan and others, 2024, the quintic iteration and its coefficients; arXiv 2502.16982, the
step of 0.2·√max(rows, columns), whose entries are as large as those that AdamW takes at the same rate). `torch.optim`
has Muon for matrices alone and iterates in bfloat16, which CPUs without matrix units of that width take thirteen times
as long for. Here what is iterated is the Gram matrix of the shorter side, which costs a tenth of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of a matrix U S Vᵀ, nearly: singular values of 0.7 to 1.2 where they are not tiny; float32 (m, n)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal_factor(matrix.T).T
    x = matrix / (matrix.norm() + 1e-12)
    gram, product = x @ x.T, torch.eye(len(x), device=x.device)
    linear, cubic, quintic = QUINTIC
    for _ in range(ITERATIONS):  # x ← factor x; all of these are polynomials of one matrix and commute
        factor = cubic * gram + quintic * (gram @ gram)
        factor.diagonal().add_(linear)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; parameters float32 of two or more dimensions."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # what a closure returns is nobody's here
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                moved = orthogonal_factor(parameter.grad.lerp(momentum, MOMENTUM).flatten(1))
                size = 0.2 * max(moved.shape) ** 0.5
                parameter.add_(moved.reshape(parameter.shape), alpha=-group["lr"] * size)
