"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2), k = 3.

A set of features spans the union of balls around its members, each reaching to the member's k-th nearest neighbour
within the set. Precision is the share of generated features in the real set's balls; recall the share of real features
in the generated set's.

Distances are float32 (squared, from norms and one matrix product), a block at a time: blocks of B rows against N take
4·B·N bytes, 400 MB for N = 50,000, whatever the number of images. ADM's evaluator computes the same in float16 first,
so its third digit may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.base.errors import UserError

NEIGHBOURS = 3
BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares in [0, 1]."""

    precision: float
    recall: float


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
    for name, features in (("reference", real), ("generated", generated)):
        if len(features) <= k:
            raise UserError(f"precision and recall with k = {k} need more than {k} {name} images, got {len(features)}")
    # A shift changes no distance, and small norms lose fewer digits in ‖x‖² − 2xy + ‖y‖².
    centre = real.mean(axis=0, dtype=np.float64).astype(np.float32)
    x, y = (
        torch.from_numpy(features.astype(np.float32) - centre).to(device or "cpu") for features in (real, generated)
    )
    return PrecisionRecall(
        precision=_share_inside(y, x, _radii2(x, k, block_rows), block_rows),
        recall=_share_inside(x, y, _radii2(y, k, block_rows), block_rows),
    )


def _distances2(x: Tensor, y: Tensor, y_norms2: Tensor) -> Tensor:
    """Squared distances (B, N)."""
    products = torch.addmm(y_norms2[None, :].expand(len(x), -1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def _radii2(x: Tensor, k: int, block_rows: int) -> Tensor:
    """Squared distance (N,) of each member to its k-th nearest other."""
    norms2 = x.square().sum(1)
    radii = []
    for start in range(0, len(x), block_rows):
        distances = _distances2(x[start : start + block_rows], x, norms2)
        own = torch.arange(len(distances), device=x.device)
        distances[own, start + own] = torch.inf
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _share_inside(x: Tensor, members: Tensor, radii2: Tensor, block_rows: int) -> float:
    """Share of x (M, D) that lies in the ball of at least one member."""
    norms2 = members.square().sum(1)
    n_inside = 0
    for part in x.split(block_rows):
        n_inside += int((_distances2(part, members, norms2) <= radii2).any(dim=1).sum())
    return n_inside / len(x)
