"""WebDataset: tars of 512 samples, shards shuffled, a buffer of 1,000 samples, as its documentation recommends.

Not a random order over the whole set: it reads front to back, which is the point of the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from benchmarks.contestants import ROWS_A_FILE, Spec, make_rows

VARIANTS = {"shuffle buffer of 1,000": None}
OWN_ORDER = ("shuffle buffer of 1,000",)
WORKERS = (0, 2, 4)


def write(root: Path, spec: Spec, n_rows: int) -> None:
    root.mkdir()
    for start in range(0, n_rows, ROWS_A_FILE):
        data = make_rows(spec, start, min(n_rows, start + ROWS_A_FILE))
        with wds.TarWriter(str(root / f"{start:07d}.tar")) as tar:
            for i in range(len(data["moments"])):
                tar.write({"__key__": f"{start + i:09d}", **{f"{n}.bin": v[i].tobytes() for n, v in data.items()}})


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    def decode(sample: dict[str, Any]) -> dict[str, np.ndarray]:
        return {a.name: np.frombuffer(sample[f"{a.name}.bin"], a.dtype).reshape(a.shape) for a in spec}

    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    # Two workers share out the tars; more workers than tars would idle.
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(1000).map(decode)
    yield from wds.WebLoader(data, batch_size=batch, num_workers=min(workers, len(urls)))
