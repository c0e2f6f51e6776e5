"""One .npy per sample and array, as the public REPA code keeps its latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP, Row, loop_or_loader

VARIANTS = {"np.load, DataLoader": None, f"np.load, {LOOP}": None}
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    for start in range(0, n_rows, ROWS_A_FILE):
        data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
        (root / f"{start:07d}").mkdir(parents=True)
        for name, values in data.items():
            for i in range(len(values)):
                np.save(root / f"{start:07d}" / f"{start + i:09d}.{name}.npy", values[i])


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    names = [array.name for array in spec]

    def open_row() -> Row:
        def row(i: int) -> dict[str, np.ndarray]:
            directory = root / f"{i - i % ROWS_A_FILE:07d}"
            return {name: np.load(directory / f"{i:09d}.{name}.npy") for name in names}

        return row

    yield from loop_or_loader(open_row, spec, order, batch, variant, workers)
