"""REG (Wu et al., arXiv 2507.01467): the encoder's class token joins the sequence, is noised, predicted and aligned.

    tokens = [LayerNorm(Linear(c_t)); patches of x_t] + positions          the class token's position is 0
    head   = one modulated norm for all; linear_cls of the first token, linear of the others

The model's state is one vector, an image and its class token end to end, (B, C·H·W + c): paths, velocities and samplers
treat all of it alike, and the class token has the width c and the scale that the encoder gave it. Parameter names are
the public checkpoints'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.transformer import DiffusionTransformer, Geometry, xavier


def join(image: Tensor, class_token: Tensor) -> Tensor:
    """State (B, C·H·W + c) of an image (B, C, H, W) and a class token (B, c)."""
    return torch.cat([image.flatten(1), class_token], dim=1)


def split(state: Tensor, config: Geometry) -> tuple[Tensor, Tensor]:
    """Image (B, C, H, W) and class token (B, c) of a state; (B, 0) of a model without, whose state is the image."""
    if not config.class_width:
        return state, state.new_empty(len(state), 0)
    image, class_token = state[:, : -config.class_width], state[:, -config.class_width :]
    return image.reshape(len(state), config.channels, config.input_size, config.input_size), class_token


class RegTransformer(DiffusionTransformer):
    """A SiT whose first token is the class token."""

    def _position(self) -> Tensor:
        """Zeros for the class token, before the patches' positions."""
        patches = super()._position()
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)

    def _add_parts(self) -> None:
        config = self.config
        self.cls_projectors2 = nn.Linear(config.class_width, config.width).apply(xavier)
        self.wg_norm = nn.LayerNorm(config.width, eps=1e-6)
        linear = nn.Linear(config.width, config.class_width)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        self.final_layer.linear_cls = linear

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + T, D) of a state (B, C·H·W + c)."""
        image, class_token = split(x, self.config)
        first = self.wg_norm(self.cls_projectors2(class_token))
        return torch.cat([first.unsqueeze(1), self.x_embedder(image)], dim=1) + self.pos_embed

    def output(self, tokens: Tensor, condition: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The state's velocity (B, C·H·W + c)."""
        modulated = self.final_layer.modulated(tokens, condition)
        linear_cls: nn.Linear = self.final_layer.linear_cls  # type: ignore[assignment]
        return join(self._unpatchified(self.final_layer.linear(modulated[:, 1:])), linear_cls(modulated[:, 0]))
