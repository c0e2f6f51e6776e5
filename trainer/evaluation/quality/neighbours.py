"""Distances between two sets of features, and to the k-th neighbour, for the metrics that count neighbours.

Distances are float32 (squared, from norms and one matrix product), a block at a time: blocks of B rows against N take
4·B·N bytes, 400 MB for N = 50,000, whatever the number of images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage.base.errors import UserError

BLOCK_ROWS = 2048


def require_neighbours(real: np.ndarray, generated: np.ndarray, k: int, what: str) -> None:
    """Raises UserError when there are too few for a k-th neighbour."""
    for name, features in (("reference", real), ("generated", generated)):
        if len(features) <= k:
            raise UserError(f"{what} with k = {k} need more than {k} {name} images, got {len(features)}")


def centred(real: np.ndarray, generated: np.ndarray, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Both sets (N, D), float32, less the real mean: a shift changes no distance, and small norms lose fewer digits."""
    centre = real.mean(axis=0, dtype=np.float64).astype(np.float32)
    x, y = (
        torch.from_numpy(features.astype(np.float32) - centre).to(device or "cpu") for features in (real, generated)
    )
    return x, y


def distances2(x: Tensor, y: Tensor, y_norms2: Tensor) -> Tensor:
    """Squared distances (B, N): ‖x‖² − 2xy + ‖y‖²."""
    products = torch.addmm(y_norms2[None, :].expand(len(x), -1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def radii2(x: Tensor, k: int, block_rows: int = BLOCK_ROWS) -> Tensor:
    """Squared distance (N,) of each member to its k-th nearest other."""
    norms2 = x.square().sum(1)
    radii = []
    for start in range(0, len(x), block_rows):
        distances = distances2(x[start : start + block_rows], x, norms2)
        own = torch.arange(len(distances), device=x.device)
        distances[own, start + own] = torch.inf
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)
