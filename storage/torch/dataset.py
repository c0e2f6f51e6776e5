"""Stores for people with a torch training loop of their own: a map-style `Dataset` that gathers whole batches.

`DataLoader` asks a data set that has `__getitems__` for a whole batch at once, so a batch is one gather an array, also
in worker processes (fork or spawn; spawn for a store in an object store). Use it with `collate_fn=collate`, since the
batch is one already:

    data = RowDataset("/stores/in256", ["latents/sd-vae-ft-mse", "features/dinov2-vitb14"])
    loader = DataLoader(data, batch_size=256, shuffle=True, num_workers=2, collate_fn=collate, pin_memory=True)

`shuffle=True` makes torch hold a permutation of all samples; `storage.batches` needs no memory for its order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from storage.batches import Gatherer
from storage.checks import ChecksumPolicy
from storage.reader import GroupReader
from storage.visits import View

Batch = dict[str, Tensor]


class RowDataset(Dataset[Batch]):
    """Samples of some groups of a store, by position; those that failed in any of the groups are left out.

    A batch maps "row" and "label" to int64 (B,) and "<group>/<array>" to (B, *row_shape) of the stored dtype, or
    float16 numbers for features in a codec when `decode`. `view` is a stored view, or "random" for a fresh choice each
    visit.

    >>> from torch.utils.data import DataLoader
    >>> from storage.torch import RowDataset, collate
    >>> data = RowDataset("stores/photos", ["latents/tiny-vae", "features/tiny-vit"], arrays=["moments", "patches"])
    >>> data
    <RowDataset of stores/photos: 1,152 samples; latents/tiny-vae/moments, features/tiny-vit/patches>
    >>> loader = DataLoader(data, batch_size=64, shuffle=True, collate_fn=collate)
    >>> batch = next(iter(loader))
    >>> {name: tuple(values.shape) for name, values in batch.items() if "/" in name}
    {'latents/tiny-vae/moments': (64, 8, 16, 16), 'features/tiny-vit/patches': (64, 64, 128)}
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        groups: Sequence[str],
        *,
        arrays: Sequence[str] = (),
        view: View = 0,
        decode: bool = True,
        checksums: ChecksumPolicy = "first",
        n_threads: int | None = None,
    ) -> None:
        """`arrays` limits what is read to arrays of these names, such as ("moments", "patches")."""
        self._gatherer = Gatherer(
            store, groups, arrays=arrays, view=view, decode=decode, checksums=checksums, n_threads=n_threads
        )

    def __len__(self) -> int:
        return len(self._gatherer.valid_rows)

    def __repr__(self) -> str:
        return repr(self._gatherer).replace(type(self._gatherer).__name__, type(self).__name__, 1)

    @property
    def groups(self) -> dict[str, GroupReader]:
        """The groups' readers by path, with their identities and codecs."""
        return self._gatherer.groups

    def __getitem__(self, position: int) -> Batch:
        """One sample, without the batch axis."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} samples")
        return {name: values[0] for name, values in self.__getitems__([position % len(self)]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """A whole batch."""
        if self._gatherer.view == "random":  # torch's generator, which its workers seed apart
            views: np.ndarray | int = torch.randint(self._gatherer.n_views, (len(positions),)).numpy()
        else:
            views = self._gatherer.view
        rows = self._gatherer.valid_rows.rows(np.asarray(positions, dtype=np.int64))
        batch = self._gatherer.gather(rows, views)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def collate(batch: Batch | list[Batch]) -> Batch:
    """`collate_fn` for `DataLoader`: a batch as it is; single samples (`batch_size=None` or other samplers) stacked."""
    if isinstance(batch, list):
        return {name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}
    return batch
