"""The Fréchet distance against what is known in closed form and against two independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.base.errors import UserError
from tests.examples import examples
from trainer.evaluation.quality.frechet import Gaussian, GaussianSum, frechet_distance, gaussian_of


def random_gaussian(rng: np.random.Generator, width: int, rank: int, decades: float = 0.0) -> Gaussian:
    """A covariance of the rank whose non-zero eigenvalues fall over so many powers of ten, in a random basis."""
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0][:, :rank]
    values = np.logspace(0, -decades, rank)
    return Gaussian(mean=rng.standard_normal(width), covariance=(basis * values) @ basis.T)


def by_matrix_root(a: Gaussian, b: Gaussian) -> float:
    """The definition as it stands in the papers, through scipy's Schur method."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real))


def by_eigenvalues(a: Gaussian, b: Gaussian) -> float:
    """tr (Σ₁Σ₂)^½ as the sum of the roots of the product's eigenvalues, in 40 decimal digits."""
    import mpmath

    with mpmath.workdps(40):
        values = mpmath.eig(mpmath.matrix(a.covariance) * mpmath.matrix(b.covariance), left=False, right=False)
        overlap = sum(mpmath.sqrt(max(mpmath.re(value), 0)) for value in values)
        shift2 = sum((mpmath.mpf(x) - mpmath.mpf(y)) ** 2 for x, y in zip(a.mean, b.mean, strict=True))
        traces = sum(mpmath.mpf(x) for g in (a, b) for x in np.diag(g.covariance))
        return float(shift2 + traces - 2 * overlap)


def test_one_dimension_is_the_textbook_formula() -> None:
    """d² = (μ₁ − μ₂)² + (σ₁ − σ₂)²: (3 − 1)² + (5 − 2)² = 13."""
    a = Gaussian(mean=np.array([3.0]), covariance=np.array([[25.0]]))
    b = Gaussian(mean=np.array([1.0]), covariance=np.array([[4.0]]))
    assert frechet_distance(a, b) == pytest.approx(13, rel=1e-14)


def test_commuting_covariances_in_a_rotated_basis() -> None:
    """Where Σ₁ and Σ₂ share eigenvectors, d² = ‖Δμ‖² + Σ (√λ − √κ)²."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    first, second = np.array([9, 4, 1, 16, 25, 0.25]), np.array([1, 4, 49, 0.0, 9, 2.25])
    a = Gaussian(mean=np.zeros(6), covariance=(basis * first) @ basis.T)
    b = Gaussian(mean=np.full(6, 2.0), covariance=(basis * second) @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(24 + 4 + 0 + 36 + 16 + 4 + 1, rel=1e-12)


def test_known_value_of_a_rank_deficient_pair() -> None:
    """Two planes in R³ that share one axis: only that axis overlaps. Traces 2 + 2, overlap 1."""
    a = Gaussian(mean=np.zeros(3), covariance=np.diag([1.0, 1.0, 0.0]))
    b = Gaussian(mean=np.zeros(3), covariance=np.diag([1.0, 0.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(2, abs=1e-14)


@pytest.mark.parametrize("width", [1, 3, 17, 64])
def test_agrees_with_the_matrix_square_root(width: int) -> None:
    rng = np.random.default_rng(width)
    a, b = (random_gaussian(rng, width, width, decades=2) for _ in range(2))
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-10)


@pytest.mark.parametrize(("rank", "decades"), [(12, 8), (12, 12), (5, 0), (3, 6), (1, 0)])
def test_agrees_with_forty_digits_when_ill_conditioned_or_rank_deficient(rank: int, decades: float) -> None:
    pytest.importorskip("mpmath", reason="comes with torch")
    rng = np.random.default_rng(rank)
    a, b = random_gaussian(rng, 12, rank, decades), random_gaussian(rng, 12, 12, decades)
    expected = by_eigenvalues(a, b)
    # What float64 covariances can say at all: a rounding of 1e-16 in a zero eigenvalue is 1e-8 in its root.
    assert frechet_distance(a, b) == pytest.approx(expected, abs=5e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=5e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=examples(60))
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(1, 17))
def test_batches_give_the_mean_and_covariance_of_the_whole(n: int, width: int, seed: int, batch: int) -> None:
    x = np.random.default_rng(seed).standard_normal((n, width)) * 3 + 1000
    total = GaussianSum(width)
    for start in range(0, n, batch):
        total.add(x[start : start + batch])
    found = total.gaussian()
    assert total.n == n
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False).reshape(width, width), rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=examples(40))
@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_is_symmetric_unmoved_by_rotation_and_scales_by_the_square(width: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n, width))  # rank deficient whenever n ≤ width
    distance = frechet_distance(gaussian_of(x), gaussian_of(y))
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    assert frechet_distance(gaussian_of(y), gaussian_of(x)) == pytest.approx(distance, abs=1e-7)
    assert frechet_distance(gaussian_of(x @ turn + 5), gaussian_of(y @ turn + 5)) == pytest.approx(distance, abs=1e-6)
    assert frechet_distance(gaussian_of(3 * x), gaussian_of(3 * y)) == pytest.approx(9 * distance, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(mean=np.zeros(3), covariance=np.zeros((2, 2))), "no Gaussian's"),
        (lambda: Gaussian(mean=np.array([np.nan]), covariance=np.zeros((1, 1))), "NaN"),
        (lambda: gaussian_of(np.zeros((1, 4))), "at least 2 images"),
        (lambda: frechet_distance(gaussian_of(np.eye(3)), gaussian_of(np.eye(4))), "widths 3 and 4"),
    ],
)
def test_what_is_no_gaussian_is_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
