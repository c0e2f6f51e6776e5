"""Hugging Face datasets: an Arrow data set of raw bytes in a DataLoader (its guide "Use with PyTorch")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP, Row, loop_or_loader

VARIANTS = {"DataLoader": "rows", f"a batch at once, {LOOP}": "batch", f"row by row, {LOOP}": "rows"}
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    def tables() -> Iterator[pa.Table]:
        for start in range(0, n_rows, ROWS_A_FILE):
            data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
            yield pa.table({n: pa.array([v.tobytes() for v in values], pa.binary()) for n, values in data.items()})

    whole = datasets.Dataset(pa.concat_tables(tables()))
    whole.save_to_disk(str(root))


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    shapes = {a.name: (a.dtype, a.shape) for a in spec}
    data = datasets.load_from_disk(str(root))
    if VARIANTS[variant] == "batch":
        for start in range(0, len(order), batch):
            part = data[order[start : start + batch].tolist()]
            yield {
                name: torch.from_numpy(np.stack([np.frombuffer(raw, kind).reshape(shape) for raw in part[name]]))
                for name, (kind, shape) in shapes.items()
            }
        return

    def open_row() -> Row:
        return lambda row: {
            name: np.frombuffer(raw, shapes[name][0]).reshape(shapes[name][1]).copy() for name, raw in data[row].items()
        }

    yield from loop_or_loader(open_row, spec, order, batch, variant, workers)
