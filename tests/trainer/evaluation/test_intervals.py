"""Intervals beside the spread of fresh samples, and the bias of a Fréchet distance beside what is known of it."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluation.quality.frechet import Gaussian, frechet_distance, gaussian_of, influence
from trainer.evaluation.quality.inception_score import inception_score, score_and_influence
from trainer.evaluation.quality.intervals import by_sample_size, interval_of

REFERENCE = Gaussian(mean=np.zeros(4), covariance=np.diag([1.0, 2.0, 0.5, 1.0]))


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.standard_normal((n, 4)) * [1.5, 1, 1, 0.7] + [0.3, 0, 0, 0.5]
    x[:, 1] += 0.5 * x[:, 0]
    return x


def test_a_frechet_distance_s_deviation_is_that_of_fresh_samples() -> None:
    rng = np.random.default_rng(0)
    fresh = [frechet_distance(gaussian_of(draw(rng, 400)), REFERENCE) for _ in range(400)]
    deviations, held = [], 0
    exact = frechet_distance(gaussian_of(draw(rng, 400_000)), REFERENCE)
    for _ in range(60):
        x = draw(rng, 400)
        own = gaussian_of(x)
        value = frechet_distance(own, REFERENCE)
        found = interval_of(value, influence(x, own, REFERENCE), resamples=300)
        deviations.append(found.deviation)
        held += found.low <= exact <= found.high
    assert np.mean(deviations) == pytest.approx(np.std(fresh), rel=0.1)
    assert held >= 50, "an interval of 95 % holds the truth nearly always"


def test_influence_is_the_derivative_by_an_image_s_weight() -> None:
    """Against finite differences: the distance of the mixture (1 − h) p + h δ_i."""
    x = draw(np.random.default_rng(1), 50)
    own = Gaussian(mean=x.mean(0), covariance=np.cov(x, rowvar=False, bias=True))
    added = influence(x, own, REFERENCE)
    assert added.sum() == pytest.approx(0, abs=1e-9)

    def tilted(i: int, h: float) -> float:
        weights = np.full(len(x), (1 - h) / len(x))
        weights[i] += h
        mean = weights @ x
        covariance = (x - mean).T @ ((x - mean) * weights[:, None])
        return frechet_distance(Gaussian(mean=mean, covariance=covariance), REFERENCE)

    for i in (0, 17, 49):
        slope = (tilted(i, 1e-5) - tilted(i, -1e-5)) / 2e-5
        assert added[i] == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_inception_score_s_deviation_is_that_of_fresh_samples() -> None:
    rng = np.random.default_rng(2)
    fresh = [inception_score(rng.standard_normal((600, 5)) * 2, split=300) for _ in range(300)]
    found = [
        interval_of(*score_and_influence(rng.standard_normal((600, 5)) * 2, split=300), resamples=200).deviation
        for _ in range(20)
    ]
    assert np.mean(found) == pytest.approx(np.std(fresh), rel=0.15)


def test_intervals_of_a_share_are_binomial_and_repeat() -> None:
    inside = np.arange(400) % 4 == 0
    found = interval_of(0.25, inside - 0.25)
    assert found.deviation == pytest.approx(np.sqrt(0.25 * 0.75 / 400), rel=0.08)
    assert 0 <= found.low < 0.25 < found.high <= 1
    assert found == interval_of(0.25, inside - 0.25)
    assert found != interval_of(0.25, inside - 0.25, seed=1)


def test_the_line_in_one_over_n_leads_near_the_distance_of_infinitely_many() -> None:
    rng = np.random.default_rng(3)
    exact = frechet_distance(gaussian_of(draw(rng, 400_000)), REFERENCE)
    wide = [
        (by_sample_size(x := draw(rng, 200), REFERENCE, frechet_distance(gaussian_of(x), REFERENCE))) for _ in range(80)
    ]
    found = [each for each in wide if each is not None]
    assert len(found) == 80
    assert next(each.sizes for each in found) == [200, 100, 50]
    means = np.mean([each.values for each in found], axis=0)
    assert means[0] < means[1] < means[2], "fewer images, a larger distance"
    error = np.std([each.infinity for each in found]) / np.sqrt(80)
    assert np.mean([each.infinity for each in found]) == pytest.approx(exact, abs=3 * error + 0.01)
    assert abs(np.mean([each.infinity for each in found]) - exact) < means[0] - exact
    assert by_sample_size(draw(rng, 16), REFERENCE, 0.0) is None, "a quarter of 16 determines no 4 × 4 covariance"


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_an_interval_of_a_share_does_not_leave_0_to_1(share: float) -> None:
    inside = np.zeros(1000)
    inside[: int(1000 * share)] = 1.0
    found = interval_of(inside.mean(), inside - inside.mean(), resamples=100)
    assert 0.0 <= found.low <= inside.mean() <= found.high <= 1.0
    if share in (0.0, 1.0):
        assert found.low == found.high == share
