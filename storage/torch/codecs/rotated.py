"""Rotated codes on a device (`storage/codecs/rotated.py`): table look-ups, sign changes and four small matrix products.

Decoding a token of D channels reads D · bits/8 bytes and makes 2 D (a + b) multiplications, a · b = D with b = 32: some
0.1 million at D = 768. Nothing waits and nothing is looked at; no graph breaks. Tables are made on a device once. TF32,
where a user allows it, adds noise of a two-thousandth, which follows the signs and averages out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.codecs import TOKENS
from storage.codecs.rotated import MEAN, SCALE, Rotated
from storage.codecs.rotation import GAMMA, MULTIPLIERS, SHIFTS, WORD_BITS, kronecker
from storage.torch.codecs.twin import Tokens, Twin

BYTE_SIGNS = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int8)  # lowest bit first; 1 is −1


class Tables(NamedTuple):
    """What a codec and a width need on a device."""

    levels: Tensor  # float32 (2ᵇ, 1)
    levels_of_byte: Tensor  # float32 (256, codes a byte)
    signs_of_byte: Tensor  # int8 (256, 8)
    steps: Tensor  # int64 (2W,): (w + 1) · γ
    outer: Tensor  # H = outer ⊗ inner, float32 (a, a)
    inner: Tensor  # float32 (b, b)


class RotatedTwin(Twin[Rotated]):
    """Packs and unpacks."""

    def __init__(self, codec: Rotated, *, compiled: bool = False) -> None:
        super().__init__(codec, compiled=compiled)
        self._decode = torch.compile(decoded, dynamic=False) if compiled else decoded
        self._tables: dict[tuple[int, torch.device], Tables] = {}

    @torch.inference_mode()
    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """`patches` uint8 (B, T, D · bits/8), `scale` float16 (B, T, 2), `mean` float16 (B, D)."""
        y = tokens.float()
        n_tokens, channels = y.shape[1:]
        tables = self.tables(channels, y.device)
        # In float64, so that no order of summation changes what float16 is rounded to.
        mean = y.double().mean(dim=1).float().half()
        r = y - mean.float().unsqueeze(1)
        first, second = signs(rows, views, n_tokens, channels, tables)
        z = turned(turned(r * first, tables.outer, tables.inner) * second, tables.outer, tables.inner)
        length2 = r.square().sum(-1, keepdim=True)
        unit = (length2 / channels).sqrt()
        q = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
        for threshold in self.codec.thresholds.tolist():
            q += z >= unit * threshold
        projected = (F.embedding(q.int(), tables.levels).squeeze(-1) * z).sum(-1, keepdim=True)
        f = torch.where(projected == 0, 0.0, length2 / projected)
        root_mean_square = y.square().mean(-1, keepdim=True).sqrt()
        packed = q[..., :: self.codec.per_byte].clone()
        for place in range(1, self.codec.per_byte):
            packed |= q[..., place :: self.codec.per_byte] << (place * self.codec.bits)
        return {TOKENS: packed, SCALE: torch.cat([f, root_mean_square], dim=-1).half(), MEAN: mean}

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """Tokens float32 (B, T, D) of codes (B, T, D·bits/8), `scale` (B, T, 2) and `mean` (B, D), on their device.

        With what is known of the exact tokens: their lengths, and how far these are off (`Tokens`). `rows` and `views`
        must be those that were encoded, as they key the rotations.
        """
        codes, scale, mean = (arrays[name] for name in self.codec.names)
        tables = self.tables(codes.shape[-1] * self.codec.per_byte, codes.device)
        return self._decode(codes, scale, mean, rows, views, tables, self.codec.rho)

    def tables(self, channels: int, device: torch.device) -> Tables:
        """Made on the device the first time, for which it waits."""
        if (channels, device) not in self._tables:
            steps = word_steps(2 * -(-channels // WORD_BITS))
            arrays = (self.codec.levels[:, None], self.codec.levels_of_byte, BYTE_SIGNS, steps, *kronecker(channels))
            with torch.inference_mode(False):
                self._tables[channels, device] = Tables(*(torch.from_numpy(array).to(device) for array in arrays))
        return self._tables[channels, device]


def decoded(
    codes: Tensor, scale: Tensor, mean: Tensor, rows: Tensor, views: Tensor | int, tables: Tables, rho: float
) -> Tokens:
    """Tokens of codes uint8 (B, T, bytes), scale float16 (B, T, 2) and mean float16 (B, D)."""
    f, root_mean_square = scale.float().unbind(-1)
    z = F.embedding(codes.int(), tables.levels_of_byte).flatten(-2) * f.unsqueeze(-1)
    n_tokens, channels = z.shape[1:]
    first, second = signs(rows, views, n_tokens, channels, tables)
    y = turned(turned(z, tables.outer.mT, tables.inner) * second, tables.outer.mT, tables.inner) * first
    return Tokens(
        values=y + mean.float().unsqueeze(1),
        norms=root_mean_square * channels**0.5,
        mean=mean.float(),
        variance=f.square() * (rho * (1 - rho)),  # ‖r̂‖²/D ≈ f²ρ, of which r has the share ρ
    )


def turned(x: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """(outer ⊗ inner) x of x (B, T, D)."""
    return (outer @ (x.reshape(-1, len(outer), len(inner)) @ inner)).reshape(x.shape)


def signs(rows: Tensor, views: Tensor | int, n_tokens: int, channels: int, tables: Tables) -> tuple[Tensor, Tensor]:
    """s₁ and s₂, int8 (B, T, D)."""
    octets = sign_words(rows, views, n_tokens, tables.steps).view(torch.uint8)
    both = F.embedding(octets.int(), tables.signs_of_byte).flatten(-2)
    return both[..., :channels], both[..., len(tables.steps) // 2 * WORD_BITS :][..., :channels]


def word_steps(n_words: int) -> np.ndarray:
    """(w + 1) · γ of each word, int64 of the same bits.

    A table, since the compiler takes a multiple of a counter for an index and does not let it wrap.
    """
    return (np.arange(1, n_words + 1, dtype=np.uint64) * np.uint64(GAMMA)).view(np.int64)


def sign_words(rows: Tensor, views: Tensor | int, n_tokens: int, steps: Tensor) -> Tensor:
    """`storage.codecs.rotation.sign_words`, int64 (B, T, n_words) of the same bits, a word for each of `word_steps`."""
    gamma = _signed(GAMMA)
    of_row = _mix(rows + gamma)
    of_view = views << 32 if isinstance(views, int) else views.long() << 32
    token = torch.arange(n_tokens, device=rows.device)
    of_token = _mix((of_row + of_view).unsqueeze(-1) + token + gamma)
    return _mix(of_token.unsqueeze(-1) + steps)


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
