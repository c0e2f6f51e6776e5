"""Plain tokens on a device: float16, or what another project stored."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from storage.codecs import TOKENS
from storage.codecs.plain import Plain
from storage.torch.codecs.twin import Tokens, Twin


class PlainTwin(Twin[Plain]):
    """Rounds, and hands out what is stored."""

    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """`patches` float16 (B, T, D)."""
        return {TOKENS: tokens.half()}

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """The array itself."""
        return Tokens(arrays[TOKENS])
