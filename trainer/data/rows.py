"""Where the rows of a batch come from: read from the store at each visit (here), or out of memory (`resident.py`).

A loader asks a `Rows` for all that it hands out but row numbers and labels, and knows no more about it. So a batch
holds the same bits wherever its rows come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from storage import ArrayReader, gather_into
from storage.visits import Visit

Arrays = dict[str, Tensor]


class Rows(Protocol):
    """The arrays that a run reads, by name. A loader's thread calls `will_read` and `gather`, the step `on_device`."""

    def buffers(self, n: int, *, pinned: bool) -> Arrays:
        """Memory of the host for what `gather` makes of a visit of `n` rows."""
        ...

    def will_read(self, visit: Visit) -> None:
        """Say that a visit comes next."""
        ...

    def gather(self, visit: Visit, buffers: Arrays) -> None:
        """Fill the buffers. Raises as reading does."""
        ...

    def on_device(self, copied: Arrays) -> Arrays:
        """A batch's arrays (B, *row_shape), given the buffers as they arrived on the training device."""
        ...

    def keep(self, names: Collection[str]) -> None:
        """Let every other array go, for good; no loader is at work."""
        ...

    def close(self) -> None:
        """Let all go."""
        ...


class Streamed:
    """Rows gathered from the store at each visit. Nothing is held but the readers, which whoever opened them closes."""

    def __init__(self, readers: Mapping[str, ArrayReader]) -> None:
        self._readers = dict(readers)

    def buffers(self, n: int, *, pinned: bool) -> Arrays:
        """One an array."""
        return {
            name: host_memory((n, *reader.row_shape), reader.dtype, pinned=pinned)
            for name, reader in self._readers.items()
        }

    def will_read(self, visit: Visit) -> None:
        """The disk begins."""
        for reader in self._readers.values():
            reader.will_read(visit.rows, visit.views)

    def gather(self, visit: Visit, buffers: Arrays) -> None:
        """Straight into the buffers."""
        gather_into(
            [(reader, buffers[name].numpy()) for name, reader in self._readers.items()], visit.rows, visit.views
        )

    def on_device(self, copied: Arrays) -> Arrays:
        """As they are."""
        return copied

    def keep(self, names: Collection[str]) -> None:
        """The other readers are not asked again."""
        self._readers = {name: reader for name, reader in self._readers.items() if name in names}

    def close(self) -> None:
        """Nothing is held."""


def host_memory(shape: tuple[int, ...], dtype: np.dtype, *, pinned: bool) -> Tensor:
    """A tensor of numpy's dtype; pinned, a GPU copies from it while the host goes on."""
    return torch.empty(shape, dtype=torch_dtype(dtype), pin_memory=pinned)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Torch's name of it."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
