"""Muon: its factor against the singular value decomposition, its step's size, and that it goes on from a state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.muon import Muon, orthogonal_factor


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6), (1, 5)])
def test_the_factor_has_the_matrixs_directions_and_nearly_equal_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert values.min() > 0.01 * values.max()
    turned = left.T @ orthogonal_factor(matrix).double() @ right.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3
    assert turned.diagonal().min() > 0.65
    assert turned.diagonal().max() < 1.25


def test_a_step_is_as_large_whatever_the_gradients_scale_and_goes_down() -> None:
    kernel = nn.Parameter(torch.zeros(4, 3, 3, 3))
    target = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    steps = []
    for scale in (1e-3, 1.0, 1e3):
        kernel.data.zero_()
        (scale * 0.5 * (kernel - target).square().sum()).backward()
        Muon([kernel], lr=0.1).step()
        kernel.grad = None
        steps.append(kernel.detach().clone())
        assert (steps[-1] * target).sum() > 0
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])
    rms = steps[0].square().mean().sqrt()  # of 4 equal singular values in a 4 × 27 matrix: 0.2·√27·√(4/(4·27)) = 0.2
    assert 0.7 * 0.02 < rms < 1.2 * 0.02


def test_a_state_goes_on_as_the_optimiser_would() -> None:
    weight = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(2)))

    def steps(parameter: nn.Parameter, optimizer: Muon, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            parameter.cos().sum().backward()
            optimizer.step()

    first = Muon([weight], lr=0.1)
    steps(weight, first, 2)
    other = nn.Parameter(weight.detach().clone())
    second = Muon([other], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(weight, first, 2)
    steps(other, second, 2)
    assert torch.equal(weight, other)
