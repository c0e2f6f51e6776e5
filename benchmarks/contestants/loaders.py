"""torch's standard DataLoader over a function that reads one row or one batch, and hand-written loops over the same.

The DataLoader is what every format's documentation shows. The loop copies rows into buffers that are used again, which
none of them shows: it spares the memory allocator and the collation, and is measured to tell how much of the difference
is the format's and how much the loader's. Libraries that read whole batches by themselves (TensorStore, zarr-python,
ArrayRecord) are looped over without worker processes, and read within a DataLoader's `__getitems__` with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.contestants import Spec

Row = Callable[[int], dict[str, np.ndarray]]
Fill = Callable[[np.ndarray, dict[str, np.ndarray]], None]  # rows (B,) into arrays (B, *shape)


class Rows(Dataset):
    """Map-style: what most projects write. `open_row` is called in the process that reads."""

    def __init__(self, open_row: Callable[[], Row], n: int) -> None:
        self._open, self._n = open_row, n
        self._row: Row | None = None

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if self._row is None:
            self._row = self._open()
        return {name: torch.from_numpy(values) for name, values in self._row(i).items()}


LOOP = "hand-written loop"


def loop_or_loader(
    open_row: Callable[[], Row], spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in `order`."""
    if LOOP not in variant:
        data = Rows(open_row, int(order.max()) + 1)
        yield from DataLoader(data, batch_size=batch, sampler=order.tolist(), num_workers=workers)
        return
    row = open_row()
    out = buffers(spec, batch)
    arrays = {name: tensor.numpy() for name, tensor in out.items()}
    for start in range(0, len(order), batch):
        for i, wanted in enumerate(order[start : start + batch].tolist()):
            for name, values in row(wanted).items():
                arrays[name][i] = values
        yield out


def buffers(spec: Spec, batch: int) -> dict[str, torch.Tensor]:
    """Tensors (B, *shape) whose pages are there already."""
    return {array.name: torch.zeros((batch, *array.shape), dtype=getattr(torch, array.dtype)) for array in spec}


class Batches(Dataset):
    """Map-style with `__getitems__`: a batch at once. `open_fill` is called in the process that reads."""

    def __init__(self, open_fill: Callable[[], Fill], spec: Spec, n: int) -> None:
        self._open, self._spec, self._n = open_fill, spec, n
        self._fill: Fill | None = None

    def __len__(self) -> int:
        return self._n

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        if self._fill is None:
            self._fill = self._open()
        out = {}
        for array in self._spec:  # in the memory that takes them to the main process, as torch's own collation does
            memory = torch.UntypedStorage._new_shared(len(rows) * array.n_bytes, device="cpu")
            out[array.name] = torch.tensor([], dtype=getattr(torch, array.dtype)).set_(memory)
            out[array.name] = out[array.name].view(len(rows), *array.shape)
        self._fill(np.array(rows), {name: tensor.numpy() for name, tensor in out.items()})
        return out


def loop_or_batch_loader(
    open_fill: Callable[[], Fill], spec: Spec, order: np.ndarray, batch: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in `order`, into buffers that are used again where no worker process reads them."""
    if workers:
        data = Batches(open_fill, spec, int(order.max()) + 1)
        yield from DataLoader(
            data, batch_size=batch, sampler=order.tolist(), num_workers=workers, collate_fn=lambda whole: whole
        )
        return
    fill, out = open_fill(), buffers(spec, batch)
    arrays = {name: tensor.numpy() for name, tensor in out.items()}
    for start in range(0, len(order), batch):
        fill(order[start : start + batch], arrays)
        yield out
