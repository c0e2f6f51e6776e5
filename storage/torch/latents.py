"""Stored moments as latents, with tensors: `storage/latents.py` has the formula."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from storage.identity import Identity
from storage.latents import MEAN, from_posterior, latents_of, normalised, refused, shift_and_scale, spread


def to_latents(
    moments: Tensor, identity: Identity, draw: torch.Generator | Literal["mean"], *, normalise: bool = True
) -> Tensor:
    """Latents float32 (B, C, h, w), where `moments` (B, 2C, h, w) are; otherwise as `storage.to_latents`.

    The generator may be of another device, where noise is then drawn and copied from.

    >>> import torch
    >>> from storage.torch import RowDataset, to_latents
    >>> data = RowDataset("stores/photos", ["latents/tiny-vae"])
    >>> moments = data[7]["latents/tiny-vae/moments"][None]  # of one sample; a DataLoader gives batches
    >>> z = to_latents(moments, data.groups["latents/tiny-vae"].identity, torch.Generator().manual_seed(0))
    >>> z.shape, z.dtype
    (torch.Size([1, 4, 16, 16]), torch.float32)
    """
    of = latents_of(identity, tuple(moments.shape))
    x = moments.float()
    if of.has_posterior:
        mean, std = x.chunk(2, dim=1)
        if isinstance(draw, torch.Generator):
            noise = torch.randn(mean.shape, generator=draw, device=draw.device)
            x = from_posterior(mean, std, noise.to(mean.device))
        elif draw == MEAN:
            x = mean
        else:
            raise refused(draw, "torch.Generator")
    if not normalise:
        return x
    shift, scale = (
        each if isinstance(each, float) else torch.from_numpy(each).float().to(x.device) for each in shift_and_scale(of)
    )
    return normalised(x, spread(shift, x), spread(scale, x))
