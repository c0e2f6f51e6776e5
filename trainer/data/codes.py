"""Reading quantised features on the device that trains: `storage.codec.decode` in torch, bit for bit the same.

value = q · scale of its group, a product of 7 and 11 bits, hence exact in float32 on every device, fused by a compiler
or not. What crosses to the device is half of float16's bytes. Cost: one pass that reads int8 and writes float32 (and a
small one over the factors) where the group size divides D; one more over the result where it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.codec import INT8, Int8Codec


def dequantise(q: Tensor, scale: Tensor, codec: Int8Codec = INT8) -> Tensor:
    """Features float32 (..., D) of q int8 (..., D) and scale float16 (..., G)."""
    factors = scale.float().unsqueeze(-1)
    parts = [
        (q[..., channels].unflatten(-1, (groups.stop - groups.start, -1)) * factors[..., groups, :]).flatten(-2)
        for channels, groups in codec.cuts(q.shape[-1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
