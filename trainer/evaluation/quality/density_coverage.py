"""Density and coverage (Naeem et al., arXiv 2002.09797, equations 5 and 8), k = 5.

Around each real image lies a ball that reaches to its k-th nearest other real image, and

    density    1/(k M) Σ_j #{ i : generated j lies in the ball of real i }       may exceed 1
    coverage   1/N Σ_i [ a generated image lies in the ball of real i ]

Unlike precision and recall they use the balls of the real set alone, which a few outliers do not widen for all. Both
sets being alike, density is 1 and coverage near 1 − 2⁻ᵏ on average for equal numbers. Distances are those of
`neighbours.py`; cost: N² + N·M distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.evaluation.quality.neighbours import BLOCK_ROWS, centred, distances2, radii2, require_neighbours

NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class DensityCoverage:
    """Of each generated image (M,) the balls that it lies in, over k; of each real one (N,) whether it is covered."""

    balls: np.ndarray
    covered: np.ndarray

    @property
    def density(self) -> float:
        """At least 0."""
        return float(self.balls.mean())

    @property
    def coverage(self) -> float:
        """Share in [0, 1]."""
        return float(self.covered.mean())


def density_coverage(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = NEIGHBOURS,
    device: torch.device | None = None,
    block_rows: int = BLOCK_ROWS,
) -> DensityCoverage:
    """Density and coverage of generated features (M, D) against real ones (N, D).

    Raises UserError when there are too few for a k-th neighbour.
    """
    require_neighbours(real, generated, k, "density and coverage")
    x, y = centred(real, generated, device)
    radii, norms2 = radii2(x, k, block_rows), y.square().sum(1)
    balls = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    covered = []
    for part, of_part in zip(x.split(block_rows), radii.split(block_rows), strict=True):
        inside = distances2(part, y, norms2) <= of_part[:, None]
        balls += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
    return DensityCoverage(balls=balls.cpu().numpy() / k, covered=torch.cat(covered).cpu().numpy())
