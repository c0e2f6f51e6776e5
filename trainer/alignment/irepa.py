"""iREPA (Singh et al., arXiv 2512.10794): the spatial structure of a target, through a convolution.

    ẑ = (z − γ · mean_T z) / (std_T z + 10⁻⁶)          a channel of an image at a time, over its T patch tokens
    L = −mean cos(ẑ, conv(h))                          the projector is one convolution on the grid of tokens

The deviation is the unbiased one (T − 1), everything in float32 whatever the target's dtype. A channel that is constant
over an image has deviation 0 and is divided by 10⁻⁶; its direction is what is left of it, (1 − γ) of its mean.

Of rotated codes (`docs/codes.md`) the mean and each token's error variance v_n are known. Then

    std² = Σ_n (ẑ_n − mean)²/(T − 1) − Σ_n v_n/(T − 1)      the codes' own error taken off, a channel at a time

and a token is taken over √(‖ẑ‖² − Σ_c v_n/(std_c + 10⁻⁶)²), not over its own length. Both differences are at least a
standard error of what they are taken from, √(2/(T − 1)) and √(2/D) of it. That is consistent, and not unbiased: a
channel that varies far less than the others is known no better than the codes' error (`benchmarks/code_bias.py`).

The paper's kernel is 3; the public code's default is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.base.errors import UserError
from storage.base.options import option
from storage.torch.codecs import Tokens
from trainer.alignment.cosine import directed_loss
from trainer.alignment.kind import Alignment

EPSILON = 1e-6


class GridProjector(nn.Module):
    """One convolution (or one linear layer) on tokens (B, T, width) that lie row by row on a grid."""

    def __init__(self, layer: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.projection_layer = layer
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, width) to (B, T, target width)."""
        if isinstance(self.projection_layer, nn.Linear):
            return self.projection_layer(tokens)
        batch, n, width = tokens.shape
        picture = tokens.transpose(1, 2).reshape(batch, width, *self.grid)
        return self.projection_layer(picture).reshape(batch, -1, n).transpose(1, 2)


def spatially_normalised(target: Tensor, gamma: float) -> Tensor:
    """ẑ of tokens (B, T, D), float32."""
    z = target.float()
    mean = z.mean(dim=1, keepdim=True)
    deviation = z.std(dim=1, keepdim=True, correction=1 if z.shape[1] > 1 else 0)
    return (z - gamma * mean) / (deviation + EPSILON)


def directions_of_codes(z: Tensor, mean: Tensor, variance: Tensor, gamma: float) -> Tensor:
    """Of decoded tokens (B, T, D), their exact mean (B, 1, D) and their error's variance a channel (B, T)."""
    n, width = max(1, z.shape[1] - 1), z.shape[2]
    spread = (z - mean).square().sum(1, keepdim=True) / n
    own = spread - variance.sum(1)[:, None, None] / n
    deviation = torch.maximum(own, spread * (2 / n) ** 0.5).sqrt() + EPSILON
    normalised = (z - gamma * mean) / deviation
    length2 = normalised.square().sum(-1, keepdim=True)
    own = length2 - variance.unsqueeze(-1) * deviation.pow(-2).sum(-1, keepdim=True)
    return normalised / torch.maximum(own, length2 * (2 / width) ** 0.5).sqrt().clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class IREPA(Alignment):
    """Negative cosine to spatially normalised tokens, through a convolution."""

    gamma: float = option(0.6, "share of an image's mean token that is taken off")
    kernel: int = option(3, "side of the convolution, odd; 1 is the public code's default")
    projector_kind: Literal["conv", "linear", "mlp"] = option("conv", "the projector; mlp is REPA's")

    loss_is_cosine: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"--loss.alignment irepa:kernel must be odd and at least 1, got {self.kernel}")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"--loss.alignment irepa:gamma must be in [0, 1], got {self.gamma}")

    @property
    def takes_class_token(self) -> bool:
        """It has no place on the grid, and no part in an image's mean and deviation."""
        return False

    @property
    def has_hidden_layers(self) -> bool:
        """As the chosen projector."""
        return self.projector_kind == "mlp"

    def projector(self, width: int, hidden: int, target_width: int, grid: int) -> nn.Module:
        """One layer, `projection_layer` in the public checkpoints, without norm or activation."""
        if self.projector_kind == "mlp":
            return super().projector(width, hidden, target_width, grid)
        if self.projector_kind == "linear":
            return GridProjector(nn.Linear(width, target_width), (grid, grid))
        layer = nn.Conv2d(width, target_width, self.kernel, padding=self.kernel // 2)
        return GridProjector(layer, (grid, grid))

    def prepared(self, target: Tokens) -> Tensor:
        """Directions of the spatially normalised tokens, float32."""
        if target.mean is None or target.variance is None:
            return F.normalize(spatially_normalised(target.values, self.gamma), dim=-1)
        return directions_of_codes(target.values.float(), target.mean.unsqueeze(1), target.variance, self.gamma)

    def loss(self, projection: Tensor, target: Tensor) -> Tensor:
        """REPA's loss of what was prepared."""
        return directed_loss(projection, target)
