"""Distances by kernels: KID and CMMD, squared maximum mean discrepancies of two sets of features.

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y)                       (Gretton et al. 2012, equation 2)

KID (Bińkowski et al., arXiv 1801.01401): k(x, y) = (x·y / D + 1)³ on Inception's features, unbiased (x ≠ x'), the mean
over 100 subsets of 1,000 of each set, drawn as torch-fidelity draws them (a seeded generator, without replacement
within a subset), so that its numbers are reproduced; its deviation is that over the subsets. Where a set has at most
1,000 images, one estimate on the whole of both.

CMMD (Jayasumana et al., arXiv 2401.09603): k(x, y) = exp(−‖x − y‖² / 2σ²), σ = 10, on CLIP's embeddings of length 1,
x = x' included, times 1,000.

Kernels are float64, a block of rows at a time. Cost: 3·10⁸·D operations for KID's subsets; N² + N·M + M² kernels for
what is computed on whole sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.base.errors import UserError

SUBSETS, SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """`influence` (M,) is what each generated image adds, mean 0, and () where `deviation` is over subsets."""

    value: float
    influence: np.ndarray
    subsets: int = 0
    subset_size: int = 0
    deviation: float = 0.0


def kid(
    real: np.ndarray, generated: np.ndarray, *, device: torch.device | None = None, subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE, seed: int = KID_SEED,
) -> Discrepancy:  # fmt: skip
    """KID of generated features (M, D) against real ones (N, D). Raises UserError for fewer than two of either."""
    n = min(len(real), len(generated))
    if n < 2:
        raise UserError(f"KID needs at least 2 images of each set, got {n}")
    if n <= subset_size:
        return _unbiased(*_placed(real, generated, device))
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        y = generated[rng.choice(len(generated), subset_size, replace=False)]
        x = real[rng.choice(len(real), subset_size, replace=False)]
        values.append(_unbiased(*_placed(x, y, device)).value)
    return Discrepancy(
        value=float(np.mean(values)),
        influence=np.empty(0),
        subsets=subsets,
        subset_size=subset_size,
        deviation=float(np.std(values)),
    )


def cmmd(real: np.ndarray, generated: np.ndarray, *, device: torch.device | None = None) -> Discrepancy:
    """CMMD of generated embeddings (M, D) against real ones (N, D), each of length 1."""
    x, y = _placed(real, generated, device)
    xx, yy, yx = _rbf_means(x, x).mean(), _rbf_means(y, y), _rbf_means(y, x)
    value = CMMD_SCALE * float(xx + yy.mean() - 2 * yx.mean())
    influence = 2 * CMMD_SCALE * (yy - yx)
    return Discrepancy(value=value, influence=(influence - influence.mean()).cpu().numpy())


def _placed(real: np.ndarray, generated: np.ndarray, device: torch.device | None) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(features.astype(np.float64)).to(device or "cpu") for features in (real, generated))
    return x, y


def _unbiased(x: Tensor, y: Tensor) -> Discrepancy:
    """MMD² by the cubic kernel, of which no image is compared with itself."""
    xx, yy = _cubic_sums(x, x) - _cubic(x, x, own=True), _cubic_sums(y, y) - _cubic(y, y, own=True)
    n, m = len(x), len(y)
    to_own, to_other = yy / (m - 1), _cubic_sums(y, x) / n
    value = float(xx.sum() / (n * (n - 1)) + to_own.mean() - 2 * to_other.mean())
    influence = 2 * (to_own - to_other)
    return Discrepancy(value=value, influence=(influence - influence.mean()).cpu().numpy())


def _cubic(a: Tensor, b: Tensor, *, own: bool = False) -> Tensor:
    products = (a * b).sum(1) if own else a @ b.T
    return (products / a.shape[1] + 1) ** 3


def _cubic_sums(a: Tensor, b: Tensor) -> Tensor:
    """Σ_j k(a_i, b_j), (A,)."""
    return torch.cat([_cubic(part, b).sum(1) for part in a.split(BLOCK_ROWS)])


def _rbf_means(a: Tensor, b: Tensor) -> Tensor:
    """Mean over j of the Gaussian kernel of a_i and b_j, (A,)."""
    norms2 = b.square().sum(1)
    means = []
    for part in a.split(BLOCK_ROWS):
        distances2 = (part.square().sum(1)[:, None] - 2 * part @ b.T + norms2).clamp_(min=0)
        means.append((-distances2 / (2 * SIGMA**2)).exp_().mean(1))
    return torch.cat(means)
