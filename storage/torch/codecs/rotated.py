"""Rotated codes on a device (`storage/codecs/rotated.py`): table look-ups, sign changes and four small matrix products.

Decoding B · T tokens of D channels reads D · bits/8 bytes each and makes about 2 D (a + b) multiplications, a · b = D with
b = 32: some 0.1 MFLOP a token at D = 768. Nothing waits and nothing is looked at; no graph breaks. Tables are made on a
device once. TF32, where a user allows it, adds noise of a two-thousandth, which is even in the signs and averages out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.codecs import TOKENS
from storage.codecs.rotated import MEAN, SCALE, Rotated
from storage.codecs.rotation import GAMMA, MULTIPLIERS, SHIFTS, WORD_BITS, kronecker
from storage.torch.codecs.twin import Tokens, Twin

BYTE_SIGNS = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int8)  # lowest bit first; 1 is −1


class RotatedTwin(Twin[Rotated]):
    """Packs and unpacks."""

    def __init__(self, codec: Rotated) -> None:
        super().__init__(codec)
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @torch.inference_mode()
    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """`patches` uint8 (B, T, D · bits/8), `scale` float16 (B, T, 2), `mean` float16 (B, D)."""
        y = tokens.float()
        n_tokens, channels = y.shape[1:]
        # In float64, so that no order of summation changes what float16 is rounded to.
        mean = y.double().mean(dim=1).float().half()
        r = y - mean.float().unsqueeze(1)
        first, second = self._signs(rows, views, n_tokens, channels)
        z = self._turned(self._turned(r * first, channels) * second, channels)
        length2 = r.square().sum(-1, keepdim=True)
        unit = (length2 / channels).sqrt()
        q = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
        for threshold in self.codec.thresholds.tolist():
            q += z >= unit * threshold
        levels = F.embedding(q.int(), self._table("levels", self.codec.levels[:, None], z.device)).squeeze(-1)
        projected = (levels * z).sum(-1, keepdim=True)
        f = torch.where(projected == 0, 0.0, length2 / projected)
        root_mean_square = y.square().mean(-1, keepdim=True).sqrt()
        packed = q[..., :: self.codec.per_byte].clone()
        for place in range(1, self.codec.per_byte):
            packed |= q[..., place :: self.codec.per_byte] << (place * self.codec.bits)
        return {TOKENS: packed, SCALE: torch.cat([f, root_mean_square], dim=-1).half(), MEAN: mean}

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """Float32, with what is known of the exact tokens."""
        codes, mean = arrays[TOKENS], arrays[MEAN].float()
        f, root_mean_square = arrays[SCALE].float().unbind(-1)
        n_tokens, channels = codes.shape[1], codes.shape[2] * self.codec.per_byte
        first, second = self._signs(rows, views, n_tokens, channels)
        table = self._table("bytes", self.codec.levels_of_byte, codes.device)
        z = F.embedding(codes.int(), table).flatten(-2) * f.unsqueeze(-1)
        y = self._turned(self._turned(z, channels, back=True) * second, channels, back=True) * first
        rho = self.codec.rho
        return Tokens(
            values=y + mean.unsqueeze(1),
            norms=root_mean_square * channels**0.5,
            mean=mean,
            variance=f.square() * (rho * (1 - rho)),  # ‖r̂‖²/D ≈ f²ρ, of which ρ is r's
        )

    def _turned(self, x: Tensor, channels: int, *, back: bool = False) -> Tensor:
        """H x of x (B, T, D), or Hᵀ x."""
        outer, inner = kronecker(channels)
        matrix = self._table("outer", outer, x.device)
        y = x.reshape(-1, len(outer), len(inner)) @ self._table("inner", inner, x.device)
        return ((matrix.mT if back else matrix) @ y).reshape(x.shape)

    def _signs(self, rows: Tensor, views: Tensor | int, n_tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        """s₁ and s₂, int8 (B, T, D)."""
        n_words = -(-channels // WORD_BITS)
        octets = sign_words(rows, views, n_tokens, 2 * n_words).view(torch.uint8)
        signs = F.embedding(octets.int(), self._table("signs", BYTE_SIGNS, rows.device)).flatten(-2)
        return signs[..., :channels], signs[..., n_words * WORD_BITS :][..., :channels]

    def _table(self, name: str, values: np.ndarray, device: torch.device) -> Tensor:
        key = (f"{name} {values.shape}", device)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = torch.from_numpy(values).to(device)
        return self._tables[key]


def sign_words(rows: Tensor, views: Tensor | int, n_tokens: int, n_words: int) -> Tensor:
    """`storage.codecs.rotation.sign_words`, int64 (B, T, n_words) of the same bits."""
    gamma = _signed(GAMMA)
    of_row = _mix(rows + gamma)
    of_view = views << 32 if isinstance(views, int) else views.long() << 32
    token = torch.arange(n_tokens, device=rows.device)
    of_token = _mix((of_row + of_view).unsqueeze(-1) + token + gamma)
    word = torch.arange(1, n_words + 1, device=rows.device) * gamma
    return _mix(of_token.unsqueeze(-1) + word)


def _mix(z: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS[:2], MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    return z ^ _shifted(z, SHIFTS[2])


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int64 has a sign, which `>>` alone would draw in."""
    return (z >> bits) & ((1 << (WORD_BITS - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << WORD_BITS) if word >> (WORD_BITS - 1) else word
