"""Random numbers of a step, keyed by (seed, purpose, step, row) and by nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator: draw k
of a row is a function of its key and counter, so it is the same on any rank, at any place in any batch, on any device,
and after a resume. The integers are equal everywhere; normal draws go through log, sin and cos, whose last bit may
differ between devices. Written in torch's int64, whose multiplication wraps modulo 2⁶⁴, so it runs on the GPU and can
be compiled.

A row that is twice in one step (across the end of an epoch) has the same draws both times.

Counter words: (block of four draws, row low, row high, step). Key: 64 bits of SHA-256 over seed and purpose.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal[
    "posterior", "noise", "class-noise", "time", "label-dropout", "view", "sample", "class-sample", "label"
]
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
ROUNDS = 10


def normal(seed: int, purpose: Purpose, step: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal draws float32 (B, *shape) for rows int64 (B,), on the rows' device (Box–Muller)."""
    n = math.prod(shape)
    words = _words(seed, purpose, step, rows, (n + 3) // 4)  # 4 × (B, blocks)
    # (0, 1] on a 24-bit grid, so that the logarithm is finite; the largest magnitude is √(48 ln 2) = 5.77.
    radii = [((word >> 8) + 1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_() for word in words[:2]]
    angles = [(word >> 8).float().mul_(2.0**-24 * 2 * math.pi) for word in words[2:]]
    pairs = [
        f for radius, angle in zip(radii, angles, strict=True) for f in (radius * angle.cos(), radius * angle.sin())
    ]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :n].reshape(len(rows), *shape)


def uniform(seed: int, purpose: Purpose, step: int, rows: Tensor) -> Tensor:
    """One uniform draw in [0, 1), float32 (B,) on a 24-bit grid, for each of rows int64 (B,)."""
    return (_words(seed, purpose, step, rows, 1)[0][:, 0] >> 8).float() * 2.0**-24


@torch.compiler.assume_constant_result  # the compiler cannot trace hashing, and the key is the same at every step
def _key(seed: int, purpose: Purpose) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _words(
    seed: int, purpose: Purpose, step: int, rows: Tensor, n_blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors (B, n_blocks) of 32-bit words."""
    assert 0 <= step <= MASK, step
    block = torch.arange(n_blocks, device=rows.device).expand(len(rows), n_blocks)
    low, high = ((rows >> shift & MASK)[:, None].expand_as(block) for shift in (0, 32))
    return philox4x32((block, low, high, torch.full_like(block, step)), _key(seed, purpose))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on four int64 tensors of 32-bit words, under a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32 & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3
