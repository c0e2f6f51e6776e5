"""Density and coverage against a rendering of the paper's equations, pair by pair, and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.base.errors import UserError
from tests.examples import examples
from trainer.evaluation.quality.density_coverage import density_coverage


def naive(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    radii = [sorted(math.dist(a, b) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    inside = [[math.dist(a, y) <= r for y in generated] for a, r in zip(real, radii, strict=True)]
    density = sum(map(sum, inside)) / (k * len(generated))
    return density, sum(any(row) for row in inside) / len(real)


@settings(deadline=None, max_examples=examples(40))
@given(st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_agrees_with_the_equations(n: int, m: int, k: int, seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, 3)), rng.standard_normal((m, 3)) * 1.3
    found = density_coverage(real, generated, k=k, block_rows=block)
    assert (found.density, found.coverage) == pytest.approx(naive(real, generated, k))


def test_equal_distributions_have_the_expected_values_and_lost_modes_less_coverage() -> None:
    """E density = 1 and E coverage = 1 − 2⁻ᵏ for equal numbers (the paper's equations 9 and 12)."""
    rng = np.random.default_rng(0)
    alike = [density_coverage(rng.standard_normal((300, 4)), rng.standard_normal((300, 4))) for _ in range(10)]
    assert np.mean([each.density for each in alike]) == pytest.approx(1, abs=0.05)
    assert np.mean([each.coverage for each in alike]) == pytest.approx(1 - 2**-5, abs=0.01)
    modes = np.concatenate([rng.standard_normal((200, 4)), rng.standard_normal((200, 4)) + 30])
    assert density_coverage(modes, rng.standard_normal((400, 4))).coverage < 0.51


def test_one_real_outlier_does_not_make_fakes_dense() -> None:
    rng = np.random.default_rng(1)
    real = np.concatenate([rng.standard_normal((200, 3)), [[50.0, 0, 0]]])
    fakes = rng.standard_normal((200, 3)) * 0.1 + [25, 0, 0]
    assert density_coverage(real, fakes).density <= 1 / 5
    with pytest.raises(UserError, match="more than 5 generated images, got 5"):
        density_coverage(real, fakes[:5])
