"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2), k = 3.

A set of features spans the union of balls around its members, each reaching to the member's k-th nearest neighbour
within the set. Precision is the share of generated features in the real set's balls; recall the share of real features
in the generated set's.

Distances are those of `neighbours.py`. ADM's evaluator computes the same in float16 first, so its third digit may
differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation.quality.neighbours import BLOCK_ROWS, centred, distances2, radii2, require_neighbours

NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Which generated images (M,) lie in the real set's balls, and which real ones (N,) in the generated set's."""

    generated_inside: np.ndarray
    real_inside: np.ndarray

    @property
    def precision(self) -> float:
        """Share in [0, 1]."""
        return float(self.generated_inside.mean())

    @property
    def recall(self) -> float:
        """Share in [0, 1]."""
        return float(self.real_inside.mean())


def precision_recall(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = NEIGHBOURS,
    device: torch.device | None = None,
    block_rows: int = BLOCK_ROWS,
) -> PrecisionRecall:
    """Precision and recall of generated features (M, D) against real ones (N, D).

    Raises UserError when there are too few for a k-th neighbour.
    """
    require_neighbours(real, generated, k, "precision and recall")
    x, y = centred(real, generated, device)
    return PrecisionRecall(
        generated_inside=_inside(y, x, radii2(x, k, block_rows), block_rows),
        real_inside=_inside(x, y, radii2(y, k, block_rows), block_rows),
    )


def _inside(x: Tensor, members: Tensor, of_members: Tensor, block_rows: int) -> np.ndarray:
    """Whether each of x (M, D) lies in the ball of at least one member, bool (M,)."""
    norms2 = members.square().sum(1)
    inside = [(distances2(part, members, norms2) <= of_members).any(dim=1) for part in x.split(block_rows)]
    return torch.cat(inside).cpu().numpy()
