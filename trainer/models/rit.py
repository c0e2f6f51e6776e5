"""RiT: a plain transformer on an encoder's features, which predicts them themselves (x̂), their class token with them.

    tokens    [Linear(class token); patches] + positions                   the class token's position is 0
    blocks    LightningDiT's, with RMS norms of queries and keys
    context   before one block, copies of the label's embedding with learned positions go in front of all; they are cut
              off before the head. No rotation turns them, nor the class token
    head      one modulated norm for all; linear_cls of the class token, linear of the patches

Time runs from noise (0) to image (1), and the output is x̂, a state of image and class token as REG's (`reg.py`). Where
`class_width` is 0 there is no class token, where `context` is 0 no context. Parameter names are the public
checkpoints'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.lightningdit import LightningDiT
from trainer.models.reg import join, split
from trainer.models.transformer import xavier


class RiT(LightningDiT):
    """x̂, projections = RiT(geometry)(x, t, y). Projections are of the patches."""

    def _position(self) -> Tensor:
        """Zeros for the class token, before the patches' positions."""
        patches = super()._position()
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1) if self.config.class_width else patches

    def _add_parts(self) -> None:
        config = self.config
        if config.class_width:
            self.cls_projectors = nn.Linear(config.class_width, config.width).apply(xavier)
            self.final_layer.linear_cls = nn.Linear(config.width, config.class_width).apply(xavier)
        if config.context:
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, config.context, config.width))

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + T, D) of a state (B, C·H·W + c); (B, T, D) without class token."""
        image, class_token = split(x, self.config)
        patches = self.x_embedder(image)
        if self.config.class_width:
            patches = torch.cat([self.cls_projectors(class_token).unsqueeze(1), patches], dim=1)
        return patches + self.pos_embed

    def before_block(self, number: int, tokens: Tensor, label: Tensor) -> Tensor:
        """The tokens, behind those of the context from its block on."""
        if not self.config.context or number != self.config.context_block:
            return tokens
        context = label.unsqueeze(1) + self.in_context_posemb
        return torch.cat([context.to(tokens.dtype), tokens], dim=1)

    def aligned(self, tokens: Tensor) -> Tensor:
        """The patches."""
        return tokens[:, -(self.config.grid**2) :]

    def output(self, tokens: Tensor, condition: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """x̂ of the state, (B, C·H·W + c), or (B, C, H, W) without class token."""
        n_patches = self.config.grid**2
        if not self.config.class_width:
            return super().output(tokens[:, -n_patches:], condition, x, time)
        modulated = self.final_layer.modulated(tokens[:, -n_patches - 1 :], condition)
        linear_cls: nn.Linear = self.final_layer.linear_cls  # type: ignore[assignment]
        return join(self._unpatchified(self.final_layer.linear(modulated[:, 1:])), linear_cls(modulated[:, 0]))
