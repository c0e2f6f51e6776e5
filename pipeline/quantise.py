"""Feature quantisation where the encoder runs: `storage.codec.encode` in torch, bit for bit the same on any device.

It takes the encoder's own float32 numbers, before any rounding to float16, and halves what is copied to the host. Cost:
a handful of elementwise passes over the encoder's output.

Not for torch.compile, whose generated GPU code may divide approximately; eager torch divides tensors correctly rounded,
which is what the codec's definition of q needs. Nothing is checked here, since looking at a value would stall the
device: a token that holds NaN or infinity gets a factor that says so (`storage.codec.unquantisable`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.codec import INT8, Q_MAX, Int8Codec


@torch.inference_mode()
def quantise(x: Tensor, codec: Int8Codec = INT8) -> tuple[Tensor, Tensor]:
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
