"""HDF5 through h5py: one row a chunk, and contiguous; rows by `read_direct`, and h5py's sorted fancy selection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP, Row, buffers, loop_or_loader

VARIANTS = {
    "chunked, DataLoader": ("chunked", "rows"),
    "contiguous, DataLoader": ("contiguous", "rows"),
    f"contiguous, {LOOP}": ("contiguous", "rows"),
    f"contiguous, sorted selection, {LOOP}": ("contiguous", "select"),
}
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    root.mkdir()
    for kind in ("chunked", "contiguous"):
        with h5py.File(root / f"{kind}.h5", "w") as file:
            for a in spec:
                chunks = (1, *a.shape) if kind == "chunked" else None
                file.create_dataset(a.name, (n_rows, *a.shape), a.dtype, chunks=chunks)
            for start in range(0, n_rows, ROWS_A_FILE):
                for name, values in make_rows(spec, start, min(n_rows, start + ROWS_A_FILE)).items():
                    file[name][start : start + len(values)] = values


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    kind, how = VARIANTS[variant]
    path = root / f"{kind}.h5"
    if how == "rows":

        def open_row() -> Row:
            file = h5py.File(path)
            data = {a.name: file[a.name] for a in spec}
            return lambda row: {name: d[row] for name, d in data.items()}

        yield from loop_or_loader(open_row, spec, order, batch, variant, workers)
        return
    out = buffers(spec, batch)
    with h5py.File(path) as file:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            by_place = np.argsort(rows)
            for a in spec:
                out[a.name].numpy()[by_place] = file[a.name][rows[by_place]]
            yield out
