"""zarr-python 3 on this project's files, with its own codecs and with the zarrs pipeline (zarrs-python's README)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

from benchmarks.contestants import Spec
from benchmarks.contestants.loaders import Fill, loop_or_batch_loader

VARIANTS = {
    "orthogonal selection": ("oindex", False),
    "row by row": ("rows", False),
    "zarrs, orthogonal selection": ("oindex", True),
    "zarrs, row by row": ("rows", True),
}
WORKERS = (0, 2, 4)
SHARES = "ours"


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    how, with_zarrs = VARIANTS[variant]

    def open_arrays() -> dict[str, zarr.Array]:
        if with_zarrs:
            import zarrs  # noqa: F401

            zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        return {
            a.name: zarr.open_array(root / ("latents/l" if a.name == "moments" else "features/f") / a.name, mode="r")
            for a in spec
        }

    def open_fill() -> Fill:
        opened = open_arrays()

        def fill(rows: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
            for name, array in opened.items():
                if how == "oindex":
                    arrays[name][:] = array.oindex[rows, 0]
                    continue
                for i, row in enumerate(rows.tolist()):
                    arrays[name][i] = array[row, 0]

        return fill

    if how == "oindex" and not workers:  # the array that zarr-python made is the batch: nothing is copied
        opened = open_arrays()
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            yield {name: torch.from_numpy(array.oindex[rows, 0]) for name, array in opened.items()}
        return
    yield from loop_or_batch_loader(open_fill, spec, order, batch, workers)
