"""REPA's alignment (arXiv 2410.06940, equation 8): L = −E[ mean_n cos(y[n], h_φ(h_t[n])) ].

Cosines are taken in float32 whatever the inputs' dtype: half-precision sums over a thousand channels would be off in
the third digit. One fused expression over the whole batch; 0 ≤ 1 + L ≤ 2, and −1 is perfect alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from trainer.alignment.kind import Alignment


def alignment_loss(projection: Tensor, target: Tensor) -> Tensor:
    """Negative cosine between projection and target (B, T, D), mean over patch tokens; float32 (B,)."""
    return directed_loss(projection, F.normalize(target.float(), dim=-1))


def directed_loss(projection: Tensor, direction: Tensor) -> Tensor:
    """The same of a target's directions (B, T, D), which are not normalised again; linear in them."""
    assert projection.shape == direction.shape, (projection.shape, direction.shape)
    return -(F.normalize(projection.float(), dim=-1) * direction).sum(-1).mean(-1)


@dataclass(frozen=True, kw_only=True)
class Cosine(Alignment):
    """Negative cosine, patch by patch."""

    loss_is_cosine: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def loss(self, projection: Tensor, target: Tensor) -> Tensor:
        """REPA's, of a target's directions."""
        return directed_loss(projection, target)
