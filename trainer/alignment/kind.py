"""What a kind of alignment says: its projector, what it makes of a target, its loss, its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.torch.codecs import Tokens

LONGEST_ERROR = 4.0  # of a direction, in its lengths; at one bit it is 0.75 ‖r‖/‖y‖, r a token less its image's mean


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The alignment of one block with one target. Its fields are the kind's options (`storage.base.options`).

    Shape legend: B batch, T patch tokens, row-major on a square grid of `grid` a side, D features of the target.
    """

    loss_is_cosine: ClassVar[bool] = False  # whether minus the loss is a mean cosine, which is logged for every kind
    linear: ClassVar[bool] = False  # in the target, so that one which is right on average gives a gradient that is too

    @property
    def takes_class_token(self) -> bool:
        """Whether a class token may stand before the patch tokens, in hidden states and in the target."""
        return True

    @property
    def has_hidden_layers(self) -> bool:
        """Whether its projector has layers of `--model.projector-width`."""
        return True

    def projector(self, width: int, hidden: int, target_width: int, grid: int) -> nn.Module:
        """From hidden states (B, T, width) to (B, T, target_width).

        Unless a kind has its own: REPA's three linear layers, `0`, `2` and `4` in the public checkpoints.
        """
        return nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target_width)
        )

    def prepared(self, target: Tokens) -> Tensor:
        """What projections are compared with, made of a target: its directions (B, T, D) float32 unless said."""
        return directions(target)

    def loss(self, projection: Tensor, target: Tensor) -> Tensor:
        """Each sample's loss, float32 (B,), of a projection (B, T, D) of any dtype and a prepared target."""
        raise NotImplementedError


def directions(target: Tokens) -> Tensor:
    """Tokens over their lengths, float32 (B, T, D).

    Tokens that are right on average are taken over the exact ones' lengths, which are stored: over their own they would
    be right no longer. Then a direction has length one on no token, and is the exact direction on average.

    The error is relative to what differs from the image's mean, not to the token: one that is short beside the others
    would have a direction that is nearly all error, as long as that is large. Where the error would be longer than
    LONGEST_ERROR, the direction is shortened until it is not: the token counts less, and is right on average still. A
    token of length zero has no direction, and counts nothing.
    """
    if target.norms is None:
        return F.normalize(target.values.float(), dim=-1)
    lengths = target.norms
    if target.variance is not None:
        error = (target.variance * target.values.shape[-1]).sqrt()
        lengths = torch.maximum(lengths, error / LONGEST_ERROR)
    over = torch.where(target.norms > 0, 1 / lengths, 0.0)  # 1 / 0 is not taken
    return target.values.float() * over.unsqueeze(-1)
