"""The affine part of an encoder's final norm, as a group's attributes hold it: f = weight · n + bias, by channel.

RAE's latents and decoders are of n, tokens after the final norm without it. A group of f, as REPA aligns with, says
what n was where its encoder's weights were recorded when it was made (`precompute`; derived groups take it over):
n = (f − bias) / weight, but for the rounding of f. It is an attribute beside the identity, which names the weight file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.base.errors import StoreError
from storage.identity import FeaturesIdentity
from storage.metadata import RESTORE, typed_attributes
from storage.schema import PackedNorm

ATTRIBUTE = "final_norm"
AFFINE, PLAIN = "final norm", "final norm without its affine part"  # an identity's `layer`


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalNorm:
    """Weight and bias, float32 (D,)."""

    weight: np.ndarray
    bias: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the numbers."""
        numbers = hashlib.sha256()
        for values in (self.weight, self.bias):
            numbers.update(values.astype("<f4").tobytes())
        return numbers.hexdigest()

    def packed(self) -> PackedNorm:
        """As attributes hold it: base64 of little-endian float32."""
        weight, bias = (
            base64.b64encode(values.astype("<f4").tobytes()).decode() for values in (self.weight, self.bias)
        )
        return {"weight": weight, "bias": bias}


def final_norm_of(attributes: Mapping[str, Any], identity: FeaturesIdentity, where: str) -> FinalNorm | None:
    """What a group's attributes say; None where they say nothing. Raises StoreError where that is damaged."""
    if ATTRIBUTE not in attributes:
        return None
    packed = typed_attributes(PackedNorm, attributes[ATTRIBUTE], f"{where}: {ATTRIBUTE}")
    try:
        weight, bias = (np.frombuffer(base64.b64decode(text), "<f4") for text in (packed["weight"], packed["bias"]))
    except ValueError:
        weight = bias = np.empty(0, np.float32)
    if not len(weight) == len(bias) == identity.width or not np.isfinite([weight, bias]).all():
        raise StoreError(f"{where}: {ATTRIBUTE} is not of {identity.width} channels; {RESTORE}")
    return FinalNorm(weight=weight, bias=bias)
