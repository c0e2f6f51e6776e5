"""The part of `storage` that imports torch, which nothing else of it imports.

dataset     stores as torch data sets, for a training loop of one's own
latents     latents of stored moments
codecs      encoding and decoding patch tokens on a device
"""

from storage.torch.dataset import RowDataset, collate
from storage.torch.latents import to_latents

__all__ = ["RowDataset", "collate", "to_latents"]
