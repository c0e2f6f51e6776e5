"""What a kind of alignment says: its projector, what it makes of a target, its loss, its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from storage.torch.codecs import Tokens


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
        return target.directions()

    def loss(self, projection: Tensor, target: Tensor) -> Tensor:
        """Each sample's loss, float32 (B,), of a projection (B, T, D) of any dtype and a prepared target."""
        raise NotImplementedError
