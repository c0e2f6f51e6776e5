"""LitData: chunks written by its `optimize`, read by StreamingDataset and StreamingDataLoader, as its README shows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP

VARIANTS = {"its own shuffle": "own", f"by index, {LOOP}": "index"}
OWN_ORDER = ("its own shuffle",)
WORKERS = (0, 2, 4)


def _samples(start: int, spec: Spec, n_rows: int) -> Iterator[dict[str, torch.Tensor]]:
    data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
    for i in range(len(data["moments"])):
        yield {name: torch.from_numpy(values[i].copy()) for name, values in data.items()}


def write(root: Path, spec: Spec, n_rows: int) -> None:
    starts = list(range(0, n_rows, ROWS_A_FILE))
    optimize(
        fn=partial(_samples, spec=spec, n_rows=n_rows), inputs=starts, output_dir=str(root), chunk_bytes="64MB",
        num_workers=2,
    )  # fmt: skip


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    own = VARIANTS[variant] == "own"
    data = StreamingDataset(str(root), shuffle=own)
    if own:
        yield from StreamingDataLoader(data, batch_size=batch, num_workers=workers)
        return
    for start in range(0, len(order), batch):
        samples = [data[row] for row in order[start : start + batch].tolist()]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
