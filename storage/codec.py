"""Feature quantisation: int8 with one float16 factor for each group of channels of a token; about half of float16.

A token of D channels is cut into G = ⌈D/128⌉ groups of 128 consecutive channels (the last may be shorter). With m the
largest magnitude in a group, the stored numbers are

    s = the smallest float16 with 127 · s ≥ m               (0 for a group of zeros)
    q = the integer nearest to x / s, halves to even        (so |q| ≤ 127)
    y = q · s                                               what is read back

Both definitions are of real numbers, so every implementation that is right gives the same bits: this one, the torch
twins in `pipeline/quantise.py` and `trainer/data/codes.py`, on any device. In float32 they come out exactly:

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

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from storage.base.boundary import parse_json
from storage.base.errors import StoreError, UserError
from storage.identity import Identity

Q_MAX = 127
LARGEST = Q_MAX * float(np.finfo(np.float16).max)  # the largest magnitude that a float16 factor can carry


@dataclass(frozen=True, kw_only=True)
class Int8Codec:
    """How features are quantised; `identity` is what a group records of it."""

    name: Literal["int8"] = "int8"
    group_channels: int = 128

    def __post_init__(self) -> None:
        if self.group_channels < 1:
            raise UserError(f"channels a group must be at least 1, got {self.group_channels}")

    @property
    def identity(self) -> dict[str, Any]:
        """The codec as it stands in a group's identity."""
        return asdict(self)

    def n_groups(self, channels: int) -> int:
        """G: factors of a token."""
        return -(-channels // self.group_channels)

    def cuts(self, channels: int) -> list[tuple[slice, slice]]:
        """(channels, groups) of the whole groups, and of the short last one where there is one."""
        n_whole = channels // self.group_channels
        end = n_whole * self.group_channels
        whole, short = (slice(0, end), slice(0, n_whole)), (slice(end, channels), slice(n_whole, n_whole + 1))
        return [cut for cut in (whole, short) if cut[0].start < cut[0].stop]


INT8 = Int8Codec()


def encode(x: np.ndarray, codec: Int8Codec = INT8) -> tuple[np.ndarray, np.ndarray]:
    """Quantise x float32 or float16 (..., D) to q int8 (..., D) and scale float16 (..., G).

    Raises UserError naming the first token that holds NaN, infinity or a magnitude above 127 · 65504.
    """
    if x.dtype not in (np.float32, np.float16):
        raise UserError(f"features to quantise must be float32 or float16, got {x.dtype}; convert them first")
    x = x.astype(np.float32, copy=False)
    starts = np.arange(0, x.shape[-1], codec.group_channels)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    with np.errstate(over="ignore"):  # infinity is what `unquantisable` looks for
        scale = (largest / np.float32(Q_MAX)).astype(np.float16)
    too_small = scale.astype(np.float32) * np.float32(Q_MAX) < largest
    scale = (scale.view(np.int16) + too_small).view(np.float16)  # positive float16 are in the order of their bits
    bad = unquantisable(scale)
    if bad is not None:
        raise refusal(f"token {bad}")
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    q = np.empty(x.shape, dtype=np.int8)
    for channels, groups in codec.cuts(x.shape[-1]):
        quotients = _grouped(x, channels, groups) / divisor[..., groups, None]
        np.rint(quotients, out=_grouped(q, channels, groups), casting="unsafe")
    return q, scale


def decode(q: np.ndarray, scale: np.ndarray, codec: Int8Codec = INT8, *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Numbers (..., D) of `dtype` from q int8 (..., D) and scale float16 (..., G); float32 is exact.

    float16 is the same rounded once, infinite from 65520 on.
    """
    assert scale.shape == (*q.shape[:-1], codec.n_groups(q.shape[-1])), (q.shape, scale.shape)
    factors = scale.astype(np.float32)[..., None]
    y = np.empty(q.shape, dtype=np.float32)
    for channels, groups in codec.cuts(q.shape[-1]):
        np.multiply(_grouped(q, channels, groups), factors[..., groups, :], out=_grouped(y, channels, groups))
    with np.errstate(over="ignore"):
        return y.astype(dtype, copy=False)


def cosine_bound(q: np.ndarray, scale: np.ndarray, codec: Int8Codec = INT8) -> np.ndarray:
    """What cos(x, y) of each token is at least, float64 (...), from what is stored; 1 for a token of zeros."""
    sizes = np.diff([*range(0, q.shape[-1], codec.group_channels), q.shape[-1]])
    error2 = (sizes * scale.astype(np.float64) ** 2).sum(-1) / 4
    norm2 = (decode(q, scale, codec, dtype=np.float64) ** 2).sum(-1)
    share = np.divide(error2, norm2, out=np.where(error2 > 0, 1.0, 0.0), where=norm2 > 0)
    return np.sqrt(np.maximum(0.0, 1 - share))


def unquantisable(scale: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first token whose factors (..., G) say that it could not be quantised, or None."""
    bad = np.argwhere(~np.isfinite(scale).all(-1))
    return tuple(bad[0].tolist()) if len(bad) else None


def refusal(which: str) -> UserError:
    """The error for a token that cannot be quantised."""
    return UserError(
        f"{which} holds NaN, infinity or a magnitude above {LARGEST:.0f}, which int8 features cannot carry; check the "
        "encoder's weights, or store float16"
    )


def codec_of(identity: Identity) -> Int8Codec | None:
    """The codec that a group's identity names, None when its patches are plain. Raises StoreError for one unknown."""
    named = identity.codec
    if named is None:
        return None
    if set(named) != {"name", "group_channels"} or named["name"] != "int8":
        raise StoreError(
            f"the features are in a codec that this code does not know, {_short(named)}; use the code that wrote them"
        )
    return parse_json(Int8Codec, json.dumps(named), "the features' codec", "use another copy of the store")


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"


def _grouped(x: np.ndarray, channels: slice, groups: slice) -> np.ndarray:
    """The channels as a view (..., groups, channels of each); repeating the factors would cost a pass of its own."""
    n_groups = groups.stop - groups.start
    return x[..., channels].reshape(*x.shape[:-1], n_groups, (channels.stop - channels.start) // n_groups)
