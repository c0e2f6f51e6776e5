"""What a codec says: how the patch tokens of a sample lie in arrays, and how they come back as numbers.

A codec is a frozen dataclass in a file of its own, whose fields are its entry in a group's identity, and its line in
`CODECS` (`storage/codecs/__init__.py`). Every other part of the project asks it. A twin in torch, for devices, is a
file in `storage/torch/codecs/`; a codec without one is computed on the host.

Shape legend: B samples of one view, T tokens, D channels. Arrays are (B, *row_shape); `rows` int64 (B,) and `views`
int64 (B,) or one int say which samples they are, which matters to a codec that is `keyed` and to no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from storage.base.errors import UserError
from storage.visits import Views

TOKENS = "patches"  # the array that every codec has


class StoredArray(NamedTuple):
    """An array of a codec: its dtype, and the shape of one sample of one view."""

    dtype: str
    row_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store patch tokens. Encoding is a function of tokens, rows and views, and of nothing else."""

    name: str  # in a group's identity

    names: ClassVar[tuple[str, ...]] = (TOKENS,)  # of its arrays
    keyed: ClassVar[bool] = False  # whether decoding needs to know which row and view a sample is
    exact: ClassVar[bool] = True  # whether a decoded token stands for itself; false: tokens are right on average only

    @property
    def spelling(self) -> str:
        """The value of `--features-dtype`, and what `ls` shows."""
        return self.name

    @property
    def dtype(self) -> str:
        """Of the array `patches`, which a group's identity names as its own."""
        return self.name

    @property
    def identity(self) -> dict[str, Any] | None:
        """The entry `codec` of a group's identity; None: no entry."""
        return asdict(self)

    def arrays(self, n_tokens: int, channels: int, /) -> dict[str, StoredArray]:
        """The arrays `names`. Raises UserError for channels that cannot be encoded."""
        raise NotImplementedError

    def tokens_shape(self, row_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(T, D) of the tokens in an array `patches` of this row shape."""
        return row_shape

    def encode(self, tokens: np.ndarray, rows: np.ndarray, views: Views) -> dict[str, np.ndarray]:
        """Arrays of tokens float32 or float16 (B, T, D).

        Raises UserError naming the first token that holds NaN, infinity, or what the codec cannot carry.
        """
        raise NotImplementedError

    def decode(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, views: Views, *, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Tokens (B, T, D) of `dtype`; float16 is float32 rounded once, infinite from 65520 on."""
        raise NotImplementedError

    def number_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """What tokens are handed out as where nobody says: float16, unless `patches` is numbers already."""
        return np.dtype(np.float16)

    def unencodable(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """Index (sample, …, token) of the first token that could not be encoded, or None.

        A twin on a device does not look at numbers; what it stores says so. Arrays have any number of axes in front.
        """
        return None

    def error_variance(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Variance of a decoded channel's error, float64 and to be broadcast over (B, T, D).

        By what is stored alone, as if errors were drawn at random. Float16's own, of what was encoded, is left out.
        """
        raise NotImplementedError

    def refusal(self, which: str) -> UserError:
        """The error for a token that cannot be encoded."""
        return UserError(f"{which} holds NaN or infinity; look at the image and the encoder's weights")


def rounding_variance(stored: np.ndarray) -> np.ndarray:
    """Variance of the rounding of numbers float16, float64 of their shape: ulp²/12, a uniform error in ±ulp/2.

    0 of numbers of any other type, which are taken for exact.
    """
    if stored.dtype != np.float16:
        return np.zeros(stored.shape)
    return np.square(np.spacing(np.abs(stored)).astype(np.float64)) / 12


def require_float(tokens: np.ndarray) -> np.ndarray:
    """The tokens as float32. Raises UserError unless they are float32 or float16."""
    if tokens.dtype not in (np.float32, np.float16):
        raise UserError(f"features to quantise must be float32 or float16, got {tokens.dtype}; convert them first")
    return tokens.astype(np.float32, copy=False)


def refuse_unencodable(codec: Codec, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise UserError naming the first token that could not be encoded."""
    bad = codec.unencodable(arrays)
    if bad is not None:
        raise codec.refusal(f"token {bad}")
