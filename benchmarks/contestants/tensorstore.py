"""TensorStore's zarr3 driver on this project's files (tutorial "Reading": asynchronous reads, batched since 0.1.63).

Measured: one read of an index array a batch; a future a row, all in flight, with the default and with two copying
threads; the same within `ts.Batch`. The array is opened once, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts
import torch

from benchmarks.contestants import Spec

VARIANTS = {
    "index array": ("index", {}),
    "a future a row": ("futures", {}),
    "a future a row in ts.Batch": ("batch", {}),
    "a future a row, 2 copy threads": ("futures", {"data_copy_concurrency": {"limit": 2}}),
}
WORKERS = (0,)
SHARES = "ours"


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    how, context = VARIANTS[variant]
    opened = {}
    for array in spec:
        group = "latents/l" if array.name == "moments" else "features/f"
        kvstore = {"driver": "file", "path": str(root / group / array.name)}
        opened[array.name] = ts.open({"driver": "zarr3", "kvstore": kvstore, "context": context}, read=True).result()
    out = {a.name: torch.zeros((batch, *a.shape), dtype=getattr(torch, a.dtype)) for a in spec}
    arrays = {name: tensor.numpy() for name, tensor in out.items()}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        if how == "index":
            reads = {name: array[rows, 0].read() for name, array in opened.items()}
            yield {name: torch.from_numpy(read.result()) for name, read in reads.items()}
            continue
        if how == "batch":
            with ts.Batch() as together:
                futures = {n: [a[row, 0].read(batch=together) for row in rows.tolist()] for n, a in opened.items()}
        else:
            futures = {name: [array[row, 0].read() for row in rows.tolist()] for name, array in opened.items()}
        for name, reads in futures.items():
            for i, read in enumerate(reads):
                arrays[name][i] = read.result()
        yield out
