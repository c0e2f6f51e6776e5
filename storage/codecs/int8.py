"""Feature quantisation: int8 with one float16 factor for each group of channels of a token; about half of float16.

A token of D channels is cut into G = ⌈D/128⌉ groups of 128 consecutive channels (the last may be shorter). With m the
largest magnitude in a group, the stored numbers are

    s = the smallest float16 with 127 · s ≥ m               (0 for a group of zeros)
    q = the integer nearest to x / s, halves to even        (so |q| ≤ 127)
    y = q · s                                               what is read back

Both definitions are of real numbers, so every implementation that is right gives the same bits: this one, the torch
twin in `storage/torch/codecs/int8.py`, on any device. In float32 they come out exactly:

  s   a float16 near m/127, however that was rounded, moved up one step if 127 · s < m. A product of 7 and 11 bits is
      exact, so the comparison decides; a fused or a reciprocal multiplication could not change it.
  q   rint(fl(x / s)) with a correctly rounded division, which rounds no quotient onto a half h = k + 1/2. For h · s is
      a float32 (19 bits), and any other float32 x differs from it by at least 2⁻²⁴ h · s, so x / s from h by at least
      2⁻²⁴ h, which is half an ulp of h or more; it is exactly that only for powers of two, where division is exact.
  y   a product of 7 and 11 bits, exact in float32, fused into a following addition or not. (float16 is y rounded once.)

Bounds. The quotient is rounded to the nearest integer, hence for each channel

    |y − x| ≤ s/2,      and  s < m/127 · (1 + 2⁻¹⁰)  where m ≥ 127 · 2⁻¹⁴, as float16's spacing is then at most 2⁻¹⁰ s;
                             s < m/127 + 2⁻²⁴        below, where factors are subnormal.

For a token, with n_g channels in group g:  ‖y − x‖² ≤ E² = ¼ Σ_g n_g s_g².  A vector within E of x makes an angle of at
most arcsin(E/‖x‖) with it, and the same holds seen from y, so for E below the norm

    cos(x, y) ≥ √(1 − E²/‖x‖²)    and    cos(x, y) ≥ √(1 − E²/‖y‖²),

the second of which needs only what is stored (`cosine_bound`). With κ_g = m_g/rms_g, E²/‖x‖² ≤ max_g κ_g² (1 + 2⁻¹⁰)² /
254²; as κ² ≤ 128 whatever the data, no token with normal factors falls below 0.9990. Gaussian channels have κ ≈ 2.7 and
a bound of 0.99994. One factor for a whole token instead would let one large channel cost all the others their digits.

Costs: (D + 2G) / 2D of float16's bytes, 0.508 where 128 divides D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import DTypeLike

from storage.base.errors import UserError
from storage.codecs.codec import TOKENS, Codec, StoredArray, refuse_unencodable, require_float
from storage.visits import Views

SCALE = "scale"  # the array of factors
Q_MAX = 127
LARGEST = Q_MAX * float(np.finfo(np.float16).max)  # the largest magnitude that a float16 factor can carry


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """How features are quantised; other group sizes than 128 are read."""

    name: Literal["int8"] = "int8"
    group_channels: int = 128

    names: ClassVar[tuple[str, ...]] = (TOKENS, SCALE)

    def __post_init__(self) -> None:
        if self.group_channels < 1:
            raise UserError(f"channels a group must be at least 1, got {self.group_channels}")

    def n_groups(self, channels: int) -> int:
        """G: factors of a token."""
        return -(-channels // self.group_channels)

    def cuts(self, channels: int) -> list[tuple[slice, slice]]:
        """(channels, groups) of the whole groups, and of the short last one where there is one."""
        n_whole = channels // self.group_channels
        end = n_whole * self.group_channels
        whole, short = (slice(0, end), slice(0, n_whole)), (slice(end, channels), slice(n_whole, n_whole + 1))
        return [cut for cut in (whole, short) if cut[0].start < cut[0].stop]

    def arrays(self, n_tokens: int, channels: int, /) -> dict[str, StoredArray]:
        """Integers and factors."""
        return {
            TOKENS: StoredArray("int8", (n_tokens, channels)),
            SCALE: StoredArray("float16", (n_tokens, self.n_groups(channels))),
        }

    def encode(self, tokens: np.ndarray, rows: np.ndarray, views: Views) -> dict[str, np.ndarray]:
        """Raises UserError for a token that holds NaN, infinity or a magnitude above 127 · 65504."""
        return dict(zip((TOKENS, SCALE), quantised(tokens, self), strict=True))

    def decode(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, views: Views, *, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """float32 is exact."""
        return numbers(arrays[TOKENS], arrays[SCALE], self, dtype=dtype)

    def error_variance(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """s²/12: a uniform error in ±s/2, (B, T, D)."""
        per_group = np.square(arrays[SCALE].astype(np.float64)) / 12
        return np.repeat(per_group, self.group_channels, axis=-1)[..., : arrays[TOKENS].shape[-1]]

    def unencodable(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """The first token with a factor that is not finite."""
        bad = np.argwhere(~np.isfinite(arrays[SCALE]).all(-1))
        return tuple(bad[0].tolist()) if len(bad) else None

    def refusal(self, which: str) -> UserError:
        """As of every codec."""
        return UserError(
            f"{which} holds NaN, infinity or a magnitude above {LARGEST:.0f}, which int8 features cannot carry; check "
            "the encoder's weights, or store float16"
        )


INT8 = Int8()


def quantised(x: np.ndarray, codec: Int8 = INT8) -> tuple[np.ndarray, np.ndarray]:
    """q int8 (..., D) and scale float16 (..., G) of x float32 or float16 (..., D). Raises as `Int8.encode`."""
    x = require_float(x)
    starts = np.arange(0, x.shape[-1], codec.group_channels)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    with np.errstate(over="ignore"):  # infinity is what `unencodable` looks for
        scale = (largest / np.float32(Q_MAX)).astype(np.float16)
    too_small = scale.astype(np.float32) * np.float32(Q_MAX) < largest
    scale = (scale.view(np.int16) + too_small).view(np.float16)  # positive float16 are in the order of their bits
    refuse_unencodable(codec, {SCALE: scale})
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    q = np.empty(x.shape, dtype=np.int8)
    for channels, groups in codec.cuts(x.shape[-1]):
        quotients = _grouped(x, channels, groups) / divisor[..., groups, None]
        np.rint(quotients, out=_grouped(q, channels, groups), casting="unsafe")
    return q, scale


def numbers(q: np.ndarray, scale: np.ndarray, codec: Int8 = INT8, *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Numbers (..., D) of `dtype` from q int8 (..., D) and scale float16 (..., G); float32 is exact."""
    assert scale.shape == (*q.shape[:-1], codec.n_groups(q.shape[-1])), (q.shape, scale.shape)
    factors = scale.astype(np.float32)[..., None]
    y = np.empty(q.shape, dtype=np.float32)
    for channels, groups in codec.cuts(q.shape[-1]):
        np.multiply(_grouped(q, channels, groups), factors[..., groups, :], out=_grouped(y, channels, groups))
    with np.errstate(over="ignore"):
        return y.astype(dtype, copy=False)


def cosine_bound(q: np.ndarray, scale: np.ndarray, codec: Int8 = INT8) -> np.ndarray:
    """What cos(x, y) of each token is at least, float64 (...), from what is stored; 1 for a token of zeros."""
    sizes = np.diff([*range(0, q.shape[-1], codec.group_channels), q.shape[-1]])
    error2 = (sizes * scale.astype(np.float64) ** 2).sum(-1) / 4
    norm2 = (numbers(q, scale, codec, dtype=np.float64) ** 2).sum(-1)
    share = np.divide(error2, norm2, out=np.where(error2 > 0, 1.0, 0.0), where=norm2 > 0)
    return np.sqrt(np.maximum(0.0, 1 - share))


def _grouped(x: np.ndarray, channels: slice, groups: slice) -> np.ndarray:
    """The channels as a view (..., groups, channels of each); repeating the factors would cost a pass of its own."""
    n_groups = groups.stop - groups.start
    return x[..., channels].reshape(*x.shape[:-1], n_groups, (channels.stop - channels.start) // n_groups)
