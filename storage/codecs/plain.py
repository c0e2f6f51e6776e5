"""Tokens as they are: one array of floating-point numbers, float16 unless another project wrote the group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from storage.codecs.codec import TOKENS, Codec, StoredArray, rounding_variance
from storage.visits import Views


@dataclass(frozen=True, kw_only=True)
class Plain(Codec):
    """Numbers. Its groups have no entry `codec` in their identity, as they had before there were codecs."""

    name: Literal["float16"] = "float16"

    @property
    def identity(self) -> None:
        """None."""
        return None

    def arrays(self, *shape: int) -> dict[str, StoredArray]:
        """`patches` alone, of any number of axes: who imports may have others."""
        return {TOKENS: StoredArray(self.name, shape)}

    def encode(self, tokens: np.ndarray, rows: np.ndarray, views: Views) -> dict[str, np.ndarray]:
        """The tokens rounded to float16; infinity and NaN stay, and `verify` and the statistics see them."""
        with np.errstate(over="ignore"):
            return {TOKENS: tokens.astype(self.name, copy=False)}

    def decode(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, views: Views, *, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """The array, of `dtype`."""
        with np.errstate(over="ignore"):
            return arrays[TOKENS].astype(dtype, copy=False)

    def error_variance(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of rounding to float16, (B, T, D)."""
        return rounding_variance(arrays[TOKENS])

    def number_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """As stored."""
        return stored
