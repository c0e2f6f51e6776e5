"""Random numbers of a step, keyed by (seed, purpose, step, row) and by nothing else.

Draw k of a row is a function of its key and counter (`storage/philox.py`), so it is the same on any rank, at any place
in any batch, on any device, and after a resume. The integers are equal everywhere; normal draws go through log, sin and
cos, whose last bit may differ between devices.

A row that is twice in one step (across the end of an epoch) has the same draws both times.

Counter words: (block of four draws, row low, row high, step). Key: 64 bits of SHA-256 over seed and purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from storage.philox import MASK, philox4x32, philox_key

Purpose = Literal["posterior", "noise", "class-noise", "time", "label-dropout", "sample", "class-sample", "label"]


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
    return philox_key(seed, purpose)


def _words(
    seed: int, purpose: Purpose, step: int, rows: Tensor, n_blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors (B, n_blocks) of 32-bit words."""
    assert 0 <= step <= MASK, step
    block = torch.arange(n_blocks, device=rows.device).expand(len(rows), n_blocks)
    low, high = ((rows >> shift & MASK)[:, None].expand_as(block) for shift in (0, 32))
    return philox4x32((block, low, high, torch.full_like(block, step)), _key(seed, purpose))
