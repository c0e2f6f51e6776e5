"""What a codec's twin does: the same as the codec, with tensors, where they are.

A twin never waits for its device and looks at no number: a token that cannot be encoded gets arrays that say so
(`Codec.unencodable`), which whoever takes them to the host asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from storage.codecs import Codec
from storage.visits import Views

C = TypeVar("C", bound=Codec)


class Tokens(NamedTuple):
    """Patch tokens, and what is known of the exact ones where these are right on average only (`Codec.exact`).

    None of tokens that stand for themselves. B samples, T tokens, D channels.
    """

    values: Tensor  # (B, T, D), floating point
    norms: Tensor | None = None  # (B, T) float32: lengths of the exact tokens
    mean: Tensor | None = None  # (B, D) float32: the exact tokens' mean over T
    variance: Tensor | None = None  # (B, T) float32: of the error of `values`, a channel

    def each(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with every tensor replaced: some of the samples, say, or another device."""
        values, *known = self
        return Tokens(function(values), *(None if tensor is None else function(tensor) for tensor in known))


class Twin(Generic[C]):
    """Encodes and decodes as `codec` does. `rows` int64 (B,) on the tensors' device, `views` likewise or one int."""

    def __init__(self, codec: C, *, compiled: bool = False) -> None:
        """`compiled`: who decodes has a compiler, and many batches of one shape."""
        self.codec, self.compiled = codec, compiled

    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """Arrays (B, *row_shape) by name, of tokens (B, T, D) taken in float32."""
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """Tokens of arrays (B, *row_shape)."""
        raise NotImplementedError


class HostTwin(Twin[Codec]):
    """Of a codec without a twin of its own: on the host, for which a device waits."""

    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """Raises UserError as the codec does."""
        arrays = self.codec.encode(tokens.float().cpu().numpy(), rows.cpu().numpy(), _on_host(views))
        return {name: torch.from_numpy(array).to(tokens.device) for name, array in arrays.items()}

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """Float32."""
        if not self.codec.exact:
            raise NotImplementedError(f"{self.codec.spelling} needs a twin, which says what is known of exact tokens")
        on_host = {name: array.cpu().numpy() for name, array in arrays.items()}
        return Tokens(torch.from_numpy(self.codec.decode(on_host, rows.cpu().numpy(), _on_host(views))).to(rows.device))


def _on_host(views: Tensor | int) -> Views:
    return views.cpu().numpy() if isinstance(views, Tensor) else views
