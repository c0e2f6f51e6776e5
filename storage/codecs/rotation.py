"""A random rotation of a token, keyed by where the token is: signs from a counter, and a fixed orthogonal matrix.

    R r = H (s₂ ⊙ H (s₁ ⊙ r))         H = DCT_m ⊗ Hadamard of order 2ᵏ, D = m · 2ᵏ, m odd

Signs are bits of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection of a counter, so that any token's are
made alone, in any order, with 64-bit integers that wrap, numpy's and torch's alike (`storage/torch/codecs/rotated.py`):

    mix(z): z ^= z >> 30; z *= BF58476D1CE4E5B9; z ^= z >> 27; z *= 94D049BB133111EB; z ^= z >> 31
    a = mix(row + γ),  b = mix(a + view · 2³² + token + γ),  word w = mix(b + (w + 1) · γ),  γ = 9E3779B97F4A7C15

With W = ⌈D/64⌉, the signs s₁ are the bits of words 0 to W − 1, s₂ those of words W to 2W − 1, the lowest bit first; a
bit of 1 is −1. Its cost is that of D/32 words, a few hundredths of the transform's; Philox4x32 would be a third of it.

Why two rounds: signs and one transform leave a single large channel with the same magnitude in every coordinate, which
coarse levels then follow instead of the rest. At one bit and a channel of 0.6 of the token's length, what is decoded is
off by a tenth of that length on average over signs; after two rounds every coordinate is a sum of D random terms.

H is a Kronecker product, applied as two small ones, of a and b = 2^min(k, 5) with D = a · b: D · (a + b)
multiplications a token instead of D². One token after another in memory (T, D) is the layout of arrays; here the inner
one is (D, T), in which both are products of large matrices.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from storage.base.errors import UserError
from storage.visits import Views

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
WORD_BITS = 64
INNER = 5  # the inner factor is at most of order 2⁵
MAX_ODD = 1023  # of m, whose part of the transform costs m multiplications a channel


def factors(channels: int) -> tuple[int, int]:
    """(m, k) with channels = m · 2ᵏ and m odd. Raises UserError when m is beyond what is sensible."""
    k = (channels & -channels).bit_length() - 1
    m = channels >> k
    if m > MAX_ODD:
        raise UserError(
            f"rotated codes of {channels} channels would need a transform of order {m}, the largest odd one is "
            f"{MAX_ODD}; store float16 or int8"
        )
    return m, k


@cache
def kronecker(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """H as float32 (a, a) ⊗ (b, b). The inner one is ±1, which is exact in any arithmetic, and symmetric."""
    m, k = factors(channels)
    inner = min(k, INNER)
    i, j = np.mgrid[:m, :m]
    dct = np.cos(np.pi * (2 * j + 1) * i / (2 * m)) * np.where(i == 0, np.sqrt(1 / m), np.sqrt(2 / m))
    outer = np.kron(dct, _hadamard(k - inner)) * 2.0 ** (-k / 2)
    return outer.astype(np.float32), _hadamard(inner).astype(np.float32)


def sign_words(rows: np.ndarray, views: Views, n_tokens: int, n_words: int) -> np.ndarray:
    """The first words uint64 (B, T, n_words) of tokens 0 to T − 1 of rows int64 (B,) and views."""
    gamma = np.uint64(GAMMA)
    of_row = _mix(np.asarray(rows).astype(np.uint64) + gamma)
    of_view = np.asarray(views).astype(np.uint64) << np.uint64(32)
    of_token = _mix((of_row + of_view)[:, None] + np.arange(n_tokens, dtype=np.uint64) + gamma)
    return _mix(of_token[..., None] + np.arange(1, n_words + 1, dtype=np.uint64) * gamma)


class Rotation:
    """R of one sample's T tokens, and its inverse. Made of that sample's words uint64 (T, 2W)."""

    def __init__(self, words: np.ndarray, channels: int) -> None:
        self._outer, self._inner = kronecker(channels)
        self._shape = (len(words), channels, len(self._outer), len(self._inner))  # T, D, a, b
        n_bytes = words.shape[1] // 2 * (WORD_BITS // 8)
        octets = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
        self._first, second = octets[:, :n_bytes], octets[:, n_bytes:]
        self._second = np.ascontiguousarray(second.T)

    def forward(self, r: np.ndarray) -> np.ndarray:
        """R r of r float32 (T, D)."""
        n_tokens, channels, a, b = self._shape
        x = _flipped(r, np.unpackbits(self._first, axis=1, count=channels, bitorder="little"))
        y = np.matmul(self._inner, x.reshape(n_tokens, a, b).transpose(1, 2, 0)).reshape(a, b * n_tokens)
        y = _flipped((self._outer @ y).reshape(channels, n_tokens), self._second_bits())
        y = (self._outer @ y.reshape(a, b * n_tokens)).reshape(a, b, n_tokens)
        return self._by_token(y)

    def inverse(self, z: np.ndarray) -> np.ndarray:
        """R⁻¹ z of z float32 (T, D)."""
        n_tokens, channels, a, b = self._shape
        y = np.matmul(self._inner, z.reshape(n_tokens, a, b).transpose(1, 2, 0)).reshape(a, b * n_tokens)
        y = _flipped((self._outer.T @ y).reshape(channels, n_tokens), self._second_bits())
        y = (self._outer.T @ y.reshape(a, b * n_tokens)).reshape(a, b, n_tokens)
        return _flipped(self._by_token(y), np.unpackbits(self._first, axis=1, count=channels, bitorder="little"))

    def _by_token(self, y: np.ndarray) -> np.ndarray:
        """The inner product of y (a, b, T), into (T, D)."""
        n_tokens, channels, a, b = self._shape
        out = np.empty((n_tokens, channels), dtype=np.float32)
        np.matmul(y.transpose(0, 2, 1), self._inner, out=out.reshape(n_tokens, a, b).transpose(1, 0, 2))
        return out

    def _second_bits(self) -> np.ndarray:
        """The bits of s₂, uint8 (D, T); unpacked by hand, since numpy is slow along a first axis."""
        n_tokens, channels, *_ = self._shape
        bits = np.empty((len(self._second), 8, n_tokens), dtype=np.uint8)
        for bit in range(8):
            np.bitwise_and(self._second >> bit, 1, out=bits[:, bit])
        return bits.reshape(-1, n_tokens)[:channels]


def _flipped(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """x float32 with its sign changed where a bit (of x's shape) is 1."""
    flipped = np.left_shift(bits, 31, dtype=np.uint32)
    np.bitwise_xor(flipped, x.view(np.uint32), out=flipped)
    return flipped.view(np.float32)


def _mix(z: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip(SHIFTS[:2], MULTIPLIERS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return z ^ (z >> np.uint64(SHIFTS[2]))


def _hadamard(k: int) -> Any:
    """Sylvester's, of order 2ᵏ: entry (i, j) is −1 to the number of ones in i & j."""
    h = np.ones((1, 1))
    for _ in range(k):
        h = np.block([[h, h], [h, -h]])
    return h
