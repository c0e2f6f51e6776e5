"""ArrayRecord files (written with group_size:1, as its README advises for random access) read through Grain.

Measured: `ArrayRecordDataSource.__getitems__` a batch; Grain's MapDataset with its default 16 reading threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import buffers

VARIANTS = {"getitems": "getitems", "MapDataset": "map"}
WORKERS = (0,)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    root.mkdir()
    for start in range(0, n_rows, ROWS_A_FILE):
        data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
        writer = ArrayRecordWriter(str(root / f"{start:07d}.array_record"), "group_size:1,uncompressed")
        for i in range(len(data["moments"])):
            writer.write(b"".join(data[array.name][i].tobytes() for array in spec))
        writer.close()


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    source = grain.sources.ArrayRecordDataSource([str(path) for path in sorted(root.glob("*"))])
    out = buffers(spec, batch)
    arrays = {name: tensor.numpy() for name, tensor in out.items()}

    def fill(i: int, record: bytes) -> None:
        start = 0
        for array in spec:
            n = int(np.prod(array.shape))
            arrays[array.name][i] = np.frombuffer(record, array.dtype, n, start).reshape(array.shape)
            start += array.n_bytes

    if VARIANTS[variant] == "getitems":
        for start in range(0, len(order), batch):
            for i, record in enumerate(source.__getitems__(order[start : start + batch].tolist())):
                fill(i, record)
            yield out
        return
    records = grain.MapDataset.range(len(order)).map(lambda i: source[int(order[i])]).to_iter_dataset()
    for i, record in enumerate(records):
        fill(i % batch, record)
        if i % batch == batch - 1:
            yield out
