"""ArrayRecord files (written with group_size:1, as its README advises for random access) read through Grain.

Measured: `ArrayRecordDataSource.__getitems__`, a batch at once; Grain's MapDataset, batched by Grain, with its default
16 threads and 500 elements ahead, and with 4 and 16, which are better for batches this large on two cores. With worker
processes: the first in a DataLoader's, the others in those of `mp_prefetch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows
from benchmarks.contestants.loaders import Fill, loop_or_batch_loader

VARIANTS = {
    "getitems": None,
    "MapDataset": grain.ReadOptions(),
    "MapDataset, 4 threads": grain.ReadOptions(num_threads=4, prefetch_buffer_size=16),
}
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    root.mkdir()
    for start in range(0, n_rows, ROWS_A_FILE):
        data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
        writer = ArrayRecordWriter(str(root / f"{start:07d}.array_record"), "group_size:1,uncompressed")
        for i in range(len(data["moments"])):
            writer.write(b"".join(data[array.name][i].tobytes() for array in spec))
        writer.close()


def parse(spec: Spec, record: bytes) -> dict[str, np.ndarray]:
    """A sample's arrays, on the record's memory."""
    found, start = {}, 0
    for array in spec:
        found[array.name] = np.frombuffer(record, array.dtype, int(np.prod(array.shape)), start).reshape(array.shape)
        start += array.n_bytes
    return found


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    paths = [str(path) for path in sorted(root.glob("*"))]
    read_options = VARIANTS[variant]
    if read_options is None:

        def open_fill() -> Fill:
            source = grain.sources.ArrayRecordDataSource(paths)

            def fill(rows: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
                for i, record in enumerate(source.__getitems__(rows.tolist())):
                    for name, values in parse(spec, record).items():
                        arrays[name][i] = values

            return fill

        yield from loop_or_batch_loader(open_fill, spec, order, batch, workers)
        return
    source = grain.sources.ArrayRecordDataSource(paths)
    samples = grain.MapDataset.range(len(order)).map(lambda i: parse(spec, source[int(order[i])]))
    whole = samples.batch(batch, drop_remainder=True).to_iter_dataset(read_options)
    for found in whole.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)):
        yield {name: torch.from_numpy(values) for name, values in found.items()}
