"""What a codec's twin does: the same as the codec, with tensors, where they are.

A twin never waits for its device and looks at no number: a token that cannot be encoded gets arrays that say so
(`Codec.unencodable`), which whoever takes them to the host asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.codecs import Codec
from storage.visits import Views

C = TypeVar("C", bound=Codec)
LONGEST_ERROR = 4.0  # of a direction, in its lengths; at one bit it is 0.75 ‖r‖/‖y‖, r a token less its image's mean


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

    def directions(self) -> Tensor:
        """Tokens over their lengths, float32 (B, T, D).

        Tokens that are right on average are taken over the exact ones' lengths, which are stored: over their own they
        would be right no longer. Then a direction has length one on no token, and is the exact direction on average.

        The error is relative to what differs from the image's mean, not to the token: one that is short beside the
        others would have a direction that is nearly all error, as long as that is large. Where the error would be
        longer than LONGEST_ERROR, the direction is shortened until it is not: the token counts less, and is right on
        average still. A token of length zero has no direction, and counts nothing.
        """
        if self.norms is None:
            return F.normalize(self.values.float(), dim=-1)
        lengths = self.norms
        if self.variance is not None:
            error = (self.variance * self.values.shape[-1]).sqrt()
            lengths = torch.maximum(lengths, error / LONGEST_ERROR)
        over = torch.where(self.norms > 0, 1 / lengths, 0.0)  # 1 / 0 is not taken
        return self.values.float() * over.unsqueeze(-1)


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
        """Tokens float32 (B, T, D) on the device of `rows`, decoded on the host.

        Raises NotImplementedError for a codec that is right on average only: it needs a twin of its own.
        """
        if not self.codec.exact:
            raise NotImplementedError(f"{self.codec.spelling} needs a twin, which says what is known of exact tokens")
        on_host = {name: array.cpu().numpy() for name, array in arrays.items()}
        return Tokens(torch.from_numpy(self.codec.decode(on_host, rows.cpu().numpy(), _on_host(views))).to(rows.device))


def _on_host(views: Tensor | int) -> Views:
    return views.cpu().numpy() if isinstance(views, Tensor) else views
