"""The Fréchet distance of two Gaussians, and the mean and covariance of features that pass by in batches.

    d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½          (Dowson and Landau 1982; FID: arXiv 1706.08500, equation 6)

(Σ₁Σ₂)^½ is never formed. With Σᵢ = RᵢRᵢᵀ, the eigenvalues of Σ₁Σ₂ are the squared singular values of R₁ᵀR₂, so

    tr (Σ₁Σ₂)^½ = the sum of the singular values of R₁ᵀR₂,

which is real and non-negative for covariances of any rank and condition: no ε on the diagonal, no imaginary part to
drop. Eigenvalues of a covariance below its rounding error are taken as zero; their square roots would be 10⁸ times
what they are. All arithmetic is float64.

Cost: two eigendecompositions and one singular value decomposition: for 2048 features about a minute on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from storage.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        width = self.mean.size
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise UserError(
                f"a mean of shape {self.mean.shape} and a covariance of {self.covariance.shape} are no Gaussian's; "
                "they are (D,) and (D, D)"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("a mean or covariance holds NaN or infinity; check the features that it was made from")

    @cached_property
    def root(self) -> np.ndarray:
        """R (D, rank) with R Rᵀ = covariance."""
        return _root(self.covariance)


class GaussianSum:
    """Mean and unbiased covariance of samples seen in batches, as of all of them at once (Chan et al. 1982)."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, x: np.ndarray) -> None:
        """Take in samples (B, D)."""
        x = x.astype(np.float64)
        mean = x.mean(axis=0)
        centred = x - mean
        delta = mean - self._mean
        total = self.n + len(x)
        self._scatter += centred.T @ centred + np.outer(delta, delta) * (self.n * len(x) / total)
        self._mean += delta * (len(x) / total)
        self.n = total

    def gaussian(self) -> Gaussian:
        """What was seen. Raises UserError for fewer than two samples."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}")
        return Gaussian(mean=self._mean, covariance=self._scatter / (self.n - 1))


def gaussian_of(features: np.ndarray, block: int = 4096) -> Gaussian:
    """Mean and covariance of features (N, D), of which `block` at a time are made float64."""
    total = GaussianSum(features.shape[1])
    for start in range(0, len(features), block):
        total.add(features[start : start + block])
    return total.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared distance d², as is published. Raises UserError when the widths differ."""
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of widths {len(a.mean)} and {len(b.mean)} cannot be compared; use one encoder for both"
        )
    overlap = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def influence(features: np.ndarray, a: Gaussian, b: Gaussian, block: int = 4096) -> np.ndarray:
    """What each image adds to the distance from b of features (N, D), whose Gaussian a is: float64 (N,), mean 0.

    d² changes with μ₁ by 2 (μ₁ − μ₂) and with Σ₁ by 1 − T, where T = R₂ (R₂ᵀ Σ₁ R₂)^(−½) R₂ᵀ carries one Gaussian onto
    the other (its optimal transport map). With c the image less the mean, that is 2 (μ₁ − μ₂)·c + cᵀ (1 − T) c.
    Only where N > D: the square root has no derivative in directions that no image has.
    """
    values, vectors = np.linalg.eigh(b.root.T @ a.covariance @ b.root)
    significant = values > values.max() * len(values) * np.finfo(np.float64).eps
    half = b.root @ (vectors[:, significant] * values[significant] ** -0.25)  # T = half halfᵀ
    shift = 2 * (a.mean - b.mean)
    added = np.empty(len(features))
    for start in range(0, len(features), block):
        c = features[start : start + block].astype(np.float64) - a.mean
        added[start : start + block] = c @ shift + np.square(c).sum(1) - np.square(c @ half).sum(1)
    return added - added.mean()


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with R Rᵀ = covariance."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    significant = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, significant] * np.sqrt(values[significant])
