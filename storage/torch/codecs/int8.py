"""int8 features on a device: the codec's definitions in torch, bit for bit the same on any.

Encoding takes the encoder's own float32 numbers, before any rounding to float16, and halves what is copied to the host;
a handful of elementwise passes. It is not for torch.compile, whose generated GPU code may divide approximately; eager
torch divides tensors correctly rounded, which is what the codec's definition of q needs.

Decoding is a product of 7 and 11 bits, hence exact in float32 everywhere, fused by a compiler or not. Cost: one pass
that reads int8 and writes float32 (and a small one over the factors) where the group size divides D; one more over the
result where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.codecs import TOKENS
from storage.codecs.int8 import INT8, Q_MAX, SCALE, Int8
from storage.torch.codecs.twin import Tokens, Twin


class Int8Twin(Twin[Int8]):
    """Integers and factors."""

    def encode(self, tokens: Tensor, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        """`patches` int8 and `scale` float16."""
        return dict(zip((TOKENS, SCALE), quantise(tokens, self.codec), strict=True))

    def decode(self, arrays: Mapping[str, Tensor], rows: Tensor, views: Tensor | int) -> Tokens:
        """Tokens float32 (B, T, D) of `patches` (B, T, D) and `scale` (B, T, G), on their device."""
        return Tokens(dequantise(arrays[TOKENS], arrays[SCALE], self.codec))


@torch.inference_mode()
def quantise(x: Tensor, codec: Int8 = INT8) -> tuple[Tensor, Tensor]:
    """q int8 (..., D) and scale float16 (..., G) of x (..., D), taken in float32, on x's device."""
    channels, group = x.shape[-1], codec.group_channels
    x = x.float()
    if channels % group:  # zeros change no group's largest magnitude
        x = F.pad(x, (0, -channels % group))
    x = x.unflatten(-1, (-1, group))
    largest = x.abs().amax(-1)
    scale = (largest / Q_MAX).half()
    too_small = scale.float() * Q_MAX < largest
    scale = (scale.view(torch.int16) + too_small).view(torch.float16)
    divisor = torch.where(scale == 0, 1.0, scale.float()).unsqueeze(-1)
    q = (x / divisor).round_().to(torch.int8).flatten(-2)
    return q[..., :channels], scale


def dequantise(q: Tensor, scale: Tensor, codec: Int8 = INT8) -> Tensor:
    """Features float32 (..., D) of q int8 (..., D) and scale float16 (..., G)."""
    factors = scale.float().unsqueeze(-1)
    parts = [
        (q[..., channels].unflatten(-1, (groups.stop - groups.start, -1)) * factors[..., groups, :]).flatten(-2)
        for channels, groups in codec.cuts(q.shape[-1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
