"""How sure a metric is: bootstrap intervals over images, and how a Fréchet distance falls with their number.

**Intervals.** A metric T of a set of images changes to first order by the mean of what each image adds, ψ_i (its
influence, mean 0). Images are drawn again with replacement, B times, and the interval holds the middle 95 % of
T + mean ψ_i over these draws (the bootstrap of Efron and Tibshirani 1993, chapters 12 and 13, of the linearised
metric). Drawing again and measuring anew would cost B covariances, and be wrong for a Fréchet distance: images that
are in a draw twice make it larger, by as much as halving their number does. What an interval covers is the choice of
images, with the reference as it is; neither the bias below nor another training seed.

**Bias.** A Fréchet distance of N images is larger than that of infinitely many by about c / N (Chong and Forsyth, arXiv
1911.07023). `by_sample_size` measures it at N, N/2 (both halves) and N/4 (all quarters) of a seeded order, and fits a
line in 1/N by least squares, whose value at 0 is FID_inf: reported as that, never as FID. Cost: six more distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.quality.frechet import Gaussian, frechet_distance, gaussian_of

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
PARTS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The middle 95 % of `resamples` draws, and their standard deviation."""

    low: float
    high: float
    deviation: float
    resamples: int
    seed: int


def interval_of(value: float, influence: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The interval of a metric's value, of what each of its N images adds, float (N,)."""
    rng = np.random.default_rng(seed)
    n = len(influence)
    means = np.array([influence[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    means = means.clip(influence.min(), influence.max())  # where a mean lies but for rounding: no share is below 0
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(
        low=value + float(low), high=value + float(high), deviation=float(means.std()), resamples=resamples, seed=seed
    )


@dataclass(frozen=True, kw_only=True)
class BySampleSize:
    """Mean distance of parts of each size, and the line's value for infinitely many images."""

    sizes: list[int]
    values: list[float]
    infinity: float


def by_sample_size(features: np.ndarray, against: Gaussian, whole: float, *, seed: int = SEED) -> BySampleSize | None:
    """How the distance falls with the number of images (N, D), of which it is `whole`.

    None where a quarter of them does not determine a covariance: there the law in 1/N does not hold.
    """
    n, width = features.shape
    if n // PARTS[-1] <= width:
        return None
    order = np.random.default_rng(seed).permutation(n)
    sizes, values = [n], [whole]
    for parts in PARTS[1:]:
        size = n // parts
        distances = [
            frechet_distance(gaussian_of(features[order[i * size : (i + 1) * size]]), against) for i in range(parts)
        ]
        sizes.append(size)
        values.append(float(np.mean(distances)))
    _, infinity = np.polyfit(1 / np.array(sizes), values, 1)
    return BySampleSize(sizes=sizes, values=values, infinity=float(infinity))
