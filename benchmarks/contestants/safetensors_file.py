"""safetensors: a file every 512 rows, rows taken by `get_slice`, as its documentation shows for partial loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP, Row, loop_or_loader

VARIANTS = {"get_slice, DataLoader": None, f"get_slice, {LOOP}": None}
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    root.mkdir()
    for start in range(0, n_rows, ROWS_A_FILE):
        save_file(make_rows(spec, start, min(n_rows, start + ROWS_A_FILE)), root / f"{start:07d}.safetensors")


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    def open_row() -> Row:
        files = [safe_open(path, framework="np") for path in sorted(root.glob("*"))]
        slices = [{array.name: file.get_slice(array.name) for array in spec} for file in files]
        return lambda row: {name: s[row % ROWS_A_FILE] for name, s in slices[row // ROWS_A_FILE].items()}

    yield from loop_or_loader(open_row, spec, order, batch, variant, workers)
