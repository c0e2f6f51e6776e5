"""LightningDiT (Yao et al., arXiv 2501.01423): a DiT with RMS norms, rotary positions and SwiGLU.

    norm    RMS norm with a weight, before the modulation                   (arXiv 1910.07467)
    rotary  queries and keys of a head of d channels: the first d/2 rotate by the row, the others by the column;
            channels 2k and 2k+1 as a plane, by position · 10000^(−4k/d)      (arXiv 2104.09864)
    mlp     w3(SiLU(a) · b), [a, b] = w12(x), ⌊8 D / 3⌋ channels within       (arXiv 2002.05202)

The sine-cosine positions of DiT stay. Time runs from noise (0) to image (1), and the output is x − ε. Parameter names
are the public checkpoints'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.blocks import LONGEST_PERIOD, Attention, Block, FinalLayer
from trainer.models.transformer import DiffusionTransformer

EPSILON = 1e-6


def rotary_angles(head_width: int, grid: int) -> Tensor:
    """Angles float32 (grid², head_width) by which channels rotate, tokens row-major; two channels share one.

    Half of the channels are of the row, in pairs, so a head has a multiple of 4 of them (`ModelConfig` says so).
    """
    assert head_width % 4 == 0, head_width
    half = head_width // 2
    frequencies = LONGEST_PERIOD ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    of_axis = (torch.arange(grid, dtype=torch.float32)[:, None] * frequencies).repeat_interleave(2, dim=1)
    rows = of_axis[:, None].expand(grid, grid, half)
    columns = of_axis[None].expand(grid, grid, half)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, 2 * half)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, T, d) with each pair of channels (2k, 2k+1) turned by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class RMSNorm(nn.RMSNorm):
    """RMS norm in the wider of x's precision and its weight's, so that neither is rounded before it.

    Autocast on a CPU gives it queries and keys in bfloat16 beside weights in float32; blocks in half precision (FSDP)
    a residual stream in float32 beside weights in bfloat16. torch has a fused kernel for neither, and warns.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) of any float dtype, normalised over D; of the wider dtype."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


class RotaryAttention(Attention):
    """Attention whose queries and keys are rotated by their tokens' places; with `qk_norm`, RMS norms before.

    `n_before` tokens stand before those of the grid, and have no place: nothing rotates them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, qk_norm: bool, grid: int, n_before: int = 0) -> None:
        super().__init__(width, heads, qk_norm)
        if qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(width // heads, eps=EPSILON) for _ in range(2))
        angles = F.pad(rotary_angles(width // heads, grid), (0, 0, n_before, 0))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def placed(self, x: Tensor) -> Tensor:
        """Queries or keys (B, heads, T, d), rotated."""
        return rotated(x, self.cos, self.sin)


class SwiGLU(nn.Module):
    """A gated layer of ⌊8 D / 3⌋ channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x (B, T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LightningBlock(Block):
    """DiT's block with other parts."""

    def __init__(self, width: int, heads: int, qk_norm: bool, grid: int, n_before: int = 0) -> None:
        super().__init__(width, heads, qk_norm)
        self.norm1, self.norm2 = (RMSNorm(width, eps=EPSILON) for _ in range(2))
        self.attn = RotaryAttention(width, heads, qk_norm, grid, n_before)
        self.mlp = SwiGLU(width)


class LightningFinalLayer(FinalLayer):
    """DiT's last layer with an RMS norm."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__(width, patch, channels)
        self.norm_final = RMSNorm(width, eps=EPSILON)


class LightningDiT(DiffusionTransformer):
    """output, projections = LightningDiT(geometry)(x, t, y), with t from noise (0) to image (1)."""

    def rotary_tables(self) -> list[dict[str, Tensor]]:
        """Cosines and sines (T, head width) of the rotary positions under their public names, of each kind of block.

        Tokens that stand before those of the grid count or do not: public tables are of both kinds.
        """
        tables: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for block in self.blocks:
            attention: RotaryAttention = block.attn  # type: ignore[assignment]
            for first in (0, attention.cos.shape[0] - self.config.grid**2):
                table = {"freqs_cos": attention.cos[first:], "freqs_sin": attention.sin[first:]}
                tables.setdefault(tuple(table["freqs_cos"].shape), table)
        return list(tables.values())

    def _make_blocks(self) -> list[Block]:
        config = self.config
        return [
            LightningBlock(config.width, config.heads, config.qk_norm, config.grid, n_before)
            for n_before in config.tokens_before
        ]

    def _make_final_layer(self) -> FinalLayer:
        return LightningFinalLayer(self.config.width, self.config.patch, self.config.out_channels)
