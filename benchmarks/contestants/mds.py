"""MosaicML Streaming, local, uncompressed (guide "Dataset format"): its own shuffle in a DataLoader, and by index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import LOOP, Row, loop_or_loader

VARIANTS = {"its own shuffle (py1e)": "own", "by index, DataLoader": "index", f"by index, {LOOP}": "index"}
OWN_ORDER = ("its own shuffle (py1e)",)
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    columns = {a.name: f"ndarray:{a.dtype}:{','.join(map(str, a.shape))}" for a in spec}
    with MDSWriter(out=str(root), columns=columns, size_limit=1 << 28) as writer:
        for start in range(0, n_rows, ROWS_A_FILE):
            data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
            for i in range(len(data["moments"])):
                writer.write({name: values[i] for name, values in data.items()})


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    clean_stale_shared_memory()
    own = VARIANTS[variant] == "own"
    data = StreamingDataset(local=str(root), shuffle=own, shuffle_algo="py1e", batch_size=batch, num_canonical_nodes=1)
    if own:
        yield from DataLoader(data, batch_size=batch, num_workers=workers)
        return

    def open_row() -> Row:
        return lambda row: dict(data[row])

    yield from loop_or_loader(open_row, spec, order, batch, variant, workers)
