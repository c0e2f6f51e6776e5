"""CKNNA against a rendering of its definition with whole matrices and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.base.errors import UserError
from tests.examples import examples
from trainer.evaluation.probing.cknna import cknna, nearest


def naive_cknna(x: np.ndarray, y: np.ndarray, k: int) -> float:
    def kernel(z: np.ndarray) -> list[list[float]]:
        unit = [row / np.sqrt(sum(v * v for v in row)) for row in z]
        return [[float(sum(p * q for p, q in zip(a, b, strict=True))) for b in unit] for a in unit]

    def near(matrix: list[list[float]], i: int) -> set[int]:
        return set(sorted((j for j in range(n) if j != i), key=lambda j: -matrix[i][j])[:k])

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        """Song et al. 2012, equation 5, for matrices with an empty diagonal."""
        ones = np.ones(n)
        middle = (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return float((np.trace(a @ b) + middle - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3)))

    def agreement(a: list[list[float]], b: list[list[float]]) -> float:
        mask = np.zeros((n, n))
        for i in range(n):
            for j in near(a, i) & near(b, i):
                mask[i, j] = 1
        return hsic(mask * np.array(a), mask * np.array(b))

    n = len(x)
    first, second = kernel(x), kernel(y)
    norm2 = max(0.0, agreement(first, first) * agreement(second, second))
    return agreement(first, second) / (norm2**0.5 + 1e-6)


@settings(deadline=None, max_examples=examples(40))
@given(st.integers(8, 24), st.integers(2, 6), st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_agrees_with_the_definition(n: int, k: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5))
    y = x @ rng.standard_normal((5, 7)) + noise * rng.standard_normal((n, 7))
    found = cknna(torch.from_numpy(x), torch.from_numpy(y), k)
    expected = naive_cknna(x, y, k)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_blocks_change_nothing() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 6)))
    whole, cut = nearest(x, 5), nearest(x, 5, block_rows=7)
    assert torch.equal(whole.index, cut.index)
    torch.testing.assert_close(whole.similarity, cut.similarity, rtol=0, atol=1e-6)


def test_corners() -> None:
    """1 with itself, scaled and rotated; near 0 for independent ones; in between for a noisy copy."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((400, 16)))
    turn = torch.from_numpy(np.linalg.qr(rng.standard_normal((16, 16)))[0])
    assert cknna(x, 3 * x @ turn) == pytest.approx(1, abs=1e-3)
    noise = torch.from_numpy(rng.standard_normal((400, 16)))
    unrelated, noisy = cknna(x, noise), cknna(x, x + 0.5 * noise)
    assert abs(unrelated) < 0.05
    assert 0.1 < noisy < 0.9
    assert cknna(x, noisy_copy := x + 0.1 * noise) > cknna(x, x + noise)
    assert cknna(noisy_copy, x) == pytest.approx(cknna(x, noisy_copy), abs=0.02)  # the masks are not symmetric


@pytest.mark.parametrize(("n", "k"), [(3, 2), (10, 10), (10, 1)])
def test_too_few_samples_are_refused(n: int, k: int) -> None:
    with pytest.raises(UserError, match=f"k = {k} and {n} samples"):
        cknna(torch.eye(n), torch.eye(n), k)
