"""DiT^DH of RAE: a deep narrow transformer says, token by token, how a shallow wide head denoises the latents.

    e = MLP([sin, cos](2π t W))     W ~ N(0, 1), drawn once and never trained
    h = blocks of s_embedder(x) + positions, under c = SiLU(e + y)                     LightningDiT's, `depth` of them
    output = head of x_embedder(x), each token under its own s_projector(SiLU(e + h))  `head_depth` of them

adaLN takes SiLU of a condition again, as published. The head has no positions but those that rotate queries and keys,
and its last layer is modulated token by token too. Time runs from image (0) to noise (1), the output is ε − x.
Parameter names are the public checkpoints'; the blocks of the head follow the others in one list.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.blocks import TIME_FREQUENCIES, Block, FinalLayer, LabelEmbedder, PatchEmbed
from trainer.models.lightningdit import LightningBlock, LightningDiT, LightningFinalLayer
from trainer.models.transformer import xavier_patches


class FourierEmbedder(nn.Module):
    """A time (B,) to (B, D): sines and cosines of random frequencies, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(TIME_FREQUENCIES), requires_grad=False)  # as the checkpoints hold it
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) as given; the angles are computed in float32."""
        angles = t.float()[:, None] * self.W[None] * (2 * math.pi)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(next(self.mlp.parameters()).dtype))


class DiTDH(LightningDiT):
    """velocity, projections = DiTDH(geometry)(x, t, y). Projections are of the blocks before the head."""

    def _make_embedders(self) -> None:
        config = self.config
        self.x_embedder = PatchEmbed(config.channels, config.head_width, config.patch)
        self.s_embedder = PatchEmbed(config.channels, config.width, config.patch)
        self.s_projector = nn.Linear(config.width, config.head_width)
        self.t_embedder = FourierEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.n_classes, config.width)

    def _make_blocks(self) -> list[Block]:
        config = self.config
        head = [
            LightningBlock(config.head_width, config.head_heads, config.qk_norm, config.grid)
            for _ in range(config.head_depth)
        ]
        return [*super()._make_blocks(), *head]

    def _make_final_layer(self) -> FinalLayer:
        return LightningFinalLayer(self.config.head_width, self.config.patch, self.config.out_channels)

    def _initialise(self) -> None:
        """Linear layers stay as PyTorch draws them, but for the embeddings'; what blocks add starts at zero."""
        xavier_patches(self.x_embedder)
        xavier_patches(self.s_embedder)
        self._initialise_conditions()
        self._zero_output()

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) of latents (B, C, H, W), with their positions."""
        return self.s_embedder(x) + self.pos_embed

    def condition(self, time: Tensor, label: Tensor) -> Tensor:
        """SiLU of the sum."""
        return F.silu(time + label)

    def output(self, tokens: Tensor, condition: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The head's velocity (B, C, H, W) of latents x."""
        of_tokens = self.s_projector(F.silu(time.unsqueeze(1) + tokens))
        denoised = self.x_embedder(x)
        for block in list(self.blocks)[self.config.depth :]:
            denoised = block(denoised, of_tokens)
        return self._unpatchified(self.final_layer(denoised, of_tokens))
