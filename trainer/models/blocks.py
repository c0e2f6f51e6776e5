"""Parts that SiT and DiT share: embeddings, the adaLN-Zero block, the final layer.

Shape legend: B batch, C latent channels, T tokens, D width, p patch side. Parameter names and shapes are the public
checkpoints' (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740), so that those load as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FREQUENCIES = 256
LONGEST_PERIOD = 10_000.0


def over_tokens(of: Tensor) -> Tensor:
    """Numbers of images (B, D) as of all their tokens (B, 1, D); numbers of tokens (B, T, D) as they are."""
    return of.unsqueeze(1) if of.dim() == 2 else of


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D) · (1 + scale) + shift, with shift and scale (B, D), or (B, T, D)."""
    return x * (1 + over_tokens(scale)) + over_tokens(shift)


def sincos_position_embedding(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, float32 (1, grid², width); tokens row-major.

    The first half of the channels encodes the column, the second the row; each half is sin(p·ω) then cos(p·ω) with
    ω_k = 10000^(−k / (width/4)), k = 0 … width/4 − 1.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    omega = LONGEST_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    position = torch.arange(grid, dtype=torch.float64)
    angles = position[:, None] * omega
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width/2)
    column = one_axis[None, :, :].expand(grid, grid, -1)
    row = one_axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, width).float()


class PatchEmbed(nn.Module):
    """Non-overlapping patches (B, C, H, W) → (B, T, D) by one strided convolution."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed x (B, C, H, W)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """A time (B,) to (B, D): 128 cosines and 128 sines of geometrically spaced frequencies, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) as given, without rescaling; the angles are computed in float32."""
        half = TIME_FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A class (B,) to (B, D). The row after the last class is the null label, for classifier-free guidance."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(n_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed y int64 (B,), in [0, n_classes]; label dropout is the training step's, not the model's."""
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over T tokens; with `qk_norm`, LayerNorm on each head's queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x (B, T, D)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (self.placed(each).to(v.dtype) for each in (self.q_norm(q), self.k_norm(k)))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))

    def placed(self, x: Tensor) -> Tensor:
        """Queries or keys (B, heads, T, d) as scores see them."""
        return x


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero: shift, scale and gate of both halves come from the condition c.

    c is (B, D), or (B, T, D) where each token has its own.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp: nn.Module = Mlp(width, mlp_ratio * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform x (B, T, D) under the condition."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + over_tokens(gate_attn) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + over_tokens(gate_mlp) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, T, D) to patch pixels (B, T, p²·C), modulated by the condition c, (B, D) or (B, T, D)."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), normalised, shifted and scaled as the condition says."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform x (B, T, D) under the condition."""
        return self.linear(self.modulated(x, c))


def unpatchify(x: Tensor, patch: int, grid: int, channels: int) -> Tensor:
    """Tokens (B, grid², p·p·C), pixels row-major and channels innermost, to (B, C, grid·p, grid·p)."""
    x = x.reshape(x.shape[0], grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], channels, grid * patch, grid * patch)
