"""Precision and recall against a rendering of the paper's equations, pair by pair; the Inception Score likewise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.base.errors import UserError
from tests.examples import examples
from trainer.evaluation.quality import neighbours
from trainer.evaluation.quality import precision_recall as module
from trainer.evaluation.quality.inception_score import inception_score
from trainer.evaluation.quality.precision_recall import precision_recall


def naive_share(candidates: np.ndarray, members: np.ndarray, k: int) -> float:
    """Equations 1 and 2: f(φ, Φ) = 1 if ‖φ − φ'‖ ≤ ‖φ' − NN_k(φ', Φ)‖ for at least one φ' in Φ."""
    inside = 0
    for candidate in candidates:
        for i, member in enumerate(members):
            others = sorted(math.dist(member, other) for j, other in enumerate(members) if j != i)
            if math.dist(candidate, member) <= others[k - 1]:
                inside += 1
                break
    return inside / len(candidates)


@settings(deadline=None, max_examples=examples(60))
@given(
    st.integers(5, 30),
    st.integers(5, 30),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
)
def test_agrees_with_the_definition_whatever_the_block(
    n: int, m: int, width: int, k: int, seed: int, block_rows: int
) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, width)), 1.5 * rng.standard_normal((m, width)) + 0.5
    found = precision_recall(real, generated, k=k, block_rows=block_rows)
    assert found.precision == naive_share(generated.tolist(), real.tolist(), k)
    assert found.recall == naive_share(real.tolist(), generated.tolist(), k)


def test_corners() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((50, 8))
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)
    elsewhere = precision_recall(real, real + 1000)
    assert (elsewhere.precision, elsewhere.recall) == (0, 0)
    one_mode = precision_recall(real, real[:1] + 1e-3 * rng.standard_normal((50, 8)))
    assert one_mode.precision == 1
    assert one_mode.recall < 0.1


def test_a_common_offset_costs_no_digits() -> None:
    """float32 norms of features around 10⁴ would leave nothing of distances around 1."""
    rng = np.random.default_rng(1)
    real, generated = rng.standard_normal((2, 200, 16))
    far = precision_recall(real + 1e4, generated + 1e4)
    near = precision_recall(real, generated)
    assert far.precision == pytest.approx(near.precision, abs=0.011)
    assert far.recall == pytest.approx(near.recall, abs=0.011)


def test_memory_is_a_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No distance matrix has more rows than a block."""
    shapes: list[tuple[int, ...]] = []
    distances2 = neighbours.distances2

    def noting(*arguments: Tensor) -> Tensor:
        found = distances2(*arguments)
        shapes.append(tuple(found.shape))
        return found

    for each in (module, neighbours):
        monkeypatch.setattr(each, "distances2", noting)
    rng = np.random.default_rng(0)
    precision_recall(rng.standard_normal((500, 4)), rng.standard_normal((300, 4)), block_rows=64)
    assert max(rows for rows, _ in shapes) == 64
    assert sum(rows for rows, _ in shapes) == 2 * (500 + 300)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="more than 3 generated images, got 3"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))


def naive_inception_score(logits: list[list[float]]) -> float:
    p = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in logits]
    marginal = [sum(row[c] for row in p) / len(p) for c in range(len(p[0]))]
    divergences = [sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p]
    return math.exp(sum(divergences) / len(divergences))


def test_inception_score_agrees_with_the_definition_and_averages_splits() -> None:
    logits = np.random.default_rng(2).standard_normal((30, 7)) * 3
    parts = [naive_inception_score(logits[start : start + 12].tolist()) for start in (0, 12, 24)]
    assert inception_score(logits, split=12) == pytest.approx(sum(parts) / 3, rel=1e-12)
    assert inception_score(100 * np.eye(10)) == pytest.approx(10)
    assert inception_score(np.ones((5, 4))) == pytest.approx(1)
