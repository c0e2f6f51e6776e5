"""Rotated codes: 1, 2 or 4 bits a channel, right on average over the keys of their rotations.

A token y of D channels, of row i, view v and place n in its image, whose T tokens have the mean μ (rounded to float16):

    r = y − μ
    z = R r                  a rotation keyed by (i, v, n): `rotation.py`
    q_j                      the nearest of 2ᵇ levels to z_j √D / ‖r‖: Lloyd–Max levels of N(0, 1)
    f = ‖r‖² / ⟨ℓ(q), z⟩     so that r̂ = R⁻¹ (f · ℓ(q)) has ⟨r̂, r⟩ = ‖r‖²
    ŷ = μ + r̂

Stored are the codes q, (f, ‖y‖/√D) of each token and μ of each image, the last two in float16. f and the root mean
square ‖y‖/√D have the size of a channel, and with it float16's range; ‖y‖ would leave it √D times earlier.

Each ŷ is far from y at few bits, by √(1/ρ − 1) · ‖r‖, ρ = 0.637, 0.883, 0.990; its mean over keys is y, and errors of
different tokens are independent (`docs/codes.md` derives both, and says what float16 leaves). Who uses them keeps to
what is linear in y, over the stored length. The rotation and f, which makes it unbiased, are RaBitQ's (Gao and Long,
arXiv 2405.12497), Lloyd–Max levels after a rotation are TurboQuant's (Zandieh et al., arXiv 2504.19874), signs and
Hadamard matrices QuIP's and QuIP#'s (arXiv 2307.13304, 2402.04396). Levels: Lloyd, "Least squares quantization in PCM",
1982; Max, "Quantizing for minimum distortion", 1960.

Codes are a function of (tokens, row, view). Two implementations agree on all but values within float32's rounding of a
threshold. Encoding a row of 256 × 768 takes 4.5 to 5.5 ms of a core (`benchmarks/results/derive.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import DTypeLike

from storage.base.errors import UserError
from storage.codecs.codec import TOKENS, Codec, StoredArray, refuse_unencodable, require_float
from storage.codecs.rotation import WORD_BITS, Rotation, factors, sign_words
from storage.visits import Views

SCALE, MEAN = "scale", "mean"  # (T, 2): f and ‖y‖/√D; (D,): μ
POSITIVE_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    4: (0.1284, 0.388, 0.6568, 0.9423, 1.2562, 1.618, 2.069, 2.7326),
}
RHO = {1: 0.63662, 2: 0.88252, 4: 0.99050}  # squared correlation of N(0, 1) with its level


@dataclass(frozen=True, kw_only=True)
class Rotated(Codec):
    """Codes of `bits` a channel."""

    name: Literal["rotated"] = "rotated"
    bits: Literal[1, 2, 4]

    names: ClassVar[tuple[str, ...]] = (TOKENS, SCALE, MEAN)
    keyed: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @property
    def spelling(self) -> str:
        """`rotated1`, `rotated2`, `rotated4`."""
        return f"{self.name}{self.bits}"

    @property
    def dtype(self) -> str:
        """Of packed codes."""
        return "uint8"

    @property
    def identity(self) -> dict[str, Any]:
        """Name and bits."""
        return asdict(self)

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def rho(self) -> float:
        """The squared cosine that r̂ and r have on average, whatever the tokens; the error's length is √(1/ρ − 1)‖r‖."""
        return RHO[self.bits]

    @cached_property
    def levels(self) -> np.ndarray:
        """Float32 (2ᵇ,), ascending."""
        positive = np.array(POSITIVE_LEVELS[self.bits])
        return np.concatenate([-positive[::-1], positive]).astype(np.float32)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Float32 (2ᵇ − 1,), half way between neighbouring levels."""
        levels = self.levels.astype(np.float64)
        return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)

    @cached_property
    def levels_of_byte(self) -> np.ndarray:
        """Float32 (256, codes a byte): what each byte stands for; its lowest bits are the first code."""
        shifts = self.bits * np.arange(self.per_byte)
        return self.levels[(np.arange(256)[:, None] >> shifts) & (2**self.bits - 1)]

    def arrays(self, n_tokens: int, channels: int, /) -> dict[str, StoredArray]:
        """Raises UserError for channels whose codes fill no whole bytes."""
        if channels % self.per_byte:
            raise UserError(
                f"{self.spelling} packs {self.per_byte} channels into a byte, which do not divide {channels} channels; "
                "store float16 or int8"
            )
        factors(channels)
        return {
            TOKENS: StoredArray(self.dtype, (n_tokens, channels // self.per_byte)),
            SCALE: StoredArray("float16", (n_tokens, 2)),
            MEAN: StoredArray("float16", (channels,)),
        }

    def tokens_shape(self, row_shape: tuple[int, ...]) -> tuple[int, ...]:
        """A byte is several channels."""
        return (*row_shape[:-1], row_shape[-1] * self.per_byte)

    def encode(self, tokens: np.ndarray, rows: np.ndarray, views: Views) -> dict[str, np.ndarray]:
        """Sample by sample, whose arithmetic fits the cache."""
        tokens = require_float(tokens)
        n, n_tokens, channels = tokens.shape
        out = {name: np.empty((n, *a.row_shape), a.dtype) for name, a in self.arrays(n_tokens, channels).items()}
        for i, words in enumerate(self._words(rows, views, n_tokens, channels)):
            with np.errstate(all="ignore"):  # `unencodable` looks for what is not finite
                out[TOKENS][i], out[SCALE][i], out[MEAN][i] = self._encoded(tokens[i], words)
        refuse_unencodable(self, out)
        return out

    def _encoded(self, y: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        channels = y.shape[1]
        mean = y.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float16)
        r = y - mean.astype(np.float32)
        z = Rotation(words, channels).forward(r)
        length2 = np.einsum("td,td->t", r, r)
        unit = np.sqrt(length2 / np.float32(channels))[:, None]
        q = np.zeros(z.shape, dtype=np.uint8)
        for threshold in self.thresholds:
            q += z >= threshold * unit
        projected = np.einsum("td,td->t", self.levels[q], z)
        f = np.divide(length2, projected, out=np.zeros_like(length2), where=projected != 0)
        root_mean_square = np.sqrt(np.einsum("td,td->t", y, y) / np.float32(channels))
        packed = q[:, :: self.per_byte].copy()
        for place in range(1, self.per_byte):
            packed |= q[:, place :: self.per_byte] << np.uint8(place * self.bits)
        return packed, np.stack([f, root_mean_square], axis=1).astype(np.float16), mean

    def decode(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, views: Views, *, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Sample by sample."""
        codes, scale, mean = (arrays[name] for name in self.names)
        n, n_tokens, n_bytes = codes.shape
        channels = n_bytes * self.per_byte
        tokens = np.empty((n, n_tokens, channels), dtype=dtype)
        for i, words in enumerate(self._words(rows, views, n_tokens, channels)):
            z = np.take(self.levels_of_byte, codes[i], axis=0).reshape(n_tokens, channels)
            z *= scale[i, :, :1].astype(np.float32)
            y = Rotation(words, channels).inverse(z)
            y += mean[i].astype(np.float32)
            with np.errstate(over="ignore"):
                tokens[i] = y
        return tokens

    def _words(self, rows: np.ndarray, views: Views, n_tokens: int, channels: int) -> np.ndarray:
        return sign_words(rows, views, n_tokens, 2 * -(-channels // WORD_BITS))

    def error_variance(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """(1/ρ − 1) ‖r‖²/D of every channel, (B, T, 1); ‖r̂‖²/D ≈ f²ρ, of which ‖r‖² has the share ρ."""
        return np.square(arrays[SCALE][..., :1].astype(np.float64)) * self.rho * (1 - self.rho)

    def unencodable(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """The first token whose length is not finite; else the first whose factor, or whose image's mean, is not."""
        lengths = np.isfinite(arrays[SCALE][..., 1])
        others = np.isfinite(arrays[SCALE][..., 0]) & np.isfinite(arrays[MEAN]).all(-1)[..., None]
        for finite in (lengths, others):
            if not finite.all():
                return tuple(np.argwhere(~finite)[0].tolist())
        return None

    def refusal(self, which: str) -> UserError:
        """As of every codec. f is ‖r‖/√D over ρ on average, and float16 like ‖y‖/√D: the former is the lower limit."""
        limit = round(float(np.finfo(np.float16).max) * self.rho, -2)
        others = [codec.spelling for codec in ROTATED if codec.bits > self.bits]
        return UserError(
            f"{which} holds NaN, infinity or channels of a root mean square, less the image's mean token, above about "
            f"{limit:,.0f}, which {self.spelling} features cannot carry; store {', '.join([*others, 'int8'])} or "
            "float16, or look at the image and the encoder's weights"
        )


ROTATED = tuple(Rotated(bits=bits) for bits in (1, 2, 4))
