"""zarr-python 3 on this project's files, with its own codecs and with the zarrs pipeline (zarrs-python's README)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

from benchmarks.contestants import Spec

VARIANTS = {
    "orthogonal selection": ("oindex", False),
    "row by row": ("rows", False),
    "zarrs, orthogonal selection": ("oindex", True),
    "zarrs, row by row": ("rows", True),
}
WORKERS = (0,)
SHARES = "ours"


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    how, with_zarrs = VARIANTS[variant]
    if with_zarrs:
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    opened = {
        a.name: zarr.open_array(root / ("latents/l" if a.name == "moments" else "features/f") / a.name, mode="r")
        for a in spec
    }
    out = {a.name: torch.zeros((batch, *a.shape), dtype=getattr(torch, a.dtype)) for a in spec}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        if how == "oindex":
            yield {name: torch.from_numpy(array.oindex[rows, 0]) for name, array in opened.items()}
            continue
        for name, array in opened.items():
            for i, row in enumerate(rows.tolist()):
                out[name].numpy()[i] = array[row, 0]
        yield out
