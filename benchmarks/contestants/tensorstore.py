"""TensorStore's zarr3 driver on this project's files (tutorial "Reading": asynchronous reads, batched since 0.1.63).

Measured: one read of an index array a batch, into an array of its own or written into a buffer that is used again; a
future a row, all in flight, with the default and with two copying threads; the same within `ts.Batch`. The array is
opened once, in the process that reads, without a cache or with the tutorial's 100 MB, an eighth of the data, in which
shard indexes stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts
import torch

from benchmarks.contestants import Spec
from benchmarks.contestants.loaders import Fill, loop_or_batch_loader

CACHE = {"cache_pool": {"total_bytes_limit": 100_000_000}}
VARIANTS = {
    "index array": ("index", {}),
    "index array into a buffer": ("write", {}),
    "index array into a buffer, cache": ("write", CACHE),
    "a future a row": ("futures", {}),
    "a future a row, cache": ("futures", CACHE),
    "a future a row in ts.Batch": ("batch", {}),
    "a future a row, 2 copy threads": ("futures", {"data_copy_concurrency": {"limit": 2}}),
}
WORKERS = (0, 2, 4)
SHARES = "ours"


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    how, context = VARIANTS[variant]

    def open_arrays() -> dict[str, ts.TensorStore]:
        opened = {}
        for array in spec:
            group = "latents/l" if array.name == "moments" else "features/f"
            kvstore = {"driver": "file", "path": str(root / group / array.name)}
            opened[array.name] = ts.open(
                {"driver": "zarr3", "kvstore": kvstore, "context": context, "recheck_cached_data": "open"}, read=True
            ).result()
        return opened

    def open_fill() -> Fill:
        opened = open_arrays()

        def fill(rows: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
            if how == "index":
                whole = {name: array[rows, 0].read() for name, array in opened.items()}
                for name, values in whole.items():
                    arrays[name][:] = values.result()
                return
            if how == "write":
                writes = [ts.array(arrays[n], write=True).write(a[rows, 0]) for n, a in opened.items()]
                for write in writes:
                    write.result()
                return
            if how == "batch":
                with ts.Batch() as together:
                    futures = {n: [a[row, 0].read(batch=together) for row in rows.tolist()] for n, a in opened.items()}
            else:
                futures = {name: [array[row, 0].read() for row in rows.tolist()] for name, array in opened.items()}
            for name, reads in futures.items():
                for i, read in enumerate(reads):
                    arrays[name][i] = read.result()

        return fill

    if how == "index" and not workers:  # the array that TensorStore made is the batch: nothing is copied
        opened = open_arrays()
        for start in range(0, len(order), batch):
            reads = {name: array[order[start : start + batch], 0].read() for name, array in opened.items()}
            yield {name: torch.from_numpy(read.result()) for name, read in reads.items()}
        return
    yield from loop_or_batch_loader(open_fill, spec, order, batch, workers)
