"""This project: `gather_into` into buffers that are used again, as the trainer does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.contestants import ROWS_A_FILE, SPECS, TOKENS, Spec, make_rows
from benchmarks.contestants.loaders import buffers
from storage import (
    ArrayLayout,
    ArrayReader,
    GroupLayout,
    Staging,
    StoreLayout,
    create_group,
    create_store,
    gather_into,
    open_store,
    publish_unit,
)
from storage.codecs import CODECS
from storage.identity import FeaturesIdentity, Identity, LatentsIdentity
from storage.index import make_index

VARIANTS: dict[str, tuple[Literal["first", "always"], int, bool]] = {
    "1 thread": ("first", 1, False),
    "2 threads": ("first", 2, False),
    "2 threads, every read checked": ("always", 2, False),
    "2 threads, reading ahead": ("first", 2, True),
}
WORKERS = (0,)


def layouts(spec: Spec, n_rows: int) -> dict[str, GroupLayout]:
    """The features and the latents group."""
    store = StoreLayout(n_rows=n_rows, views=("original",), resolution=256, shard_rows=ROWS_A_FILE)
    arrays = {a.name: ArrayLayout(name=a.name, dtype=a.dtype, row_shape=a.shape, store=store) for a in spec}
    moments = arrays.pop("moments")
    return {
        "features/f": GroupLayout(path="features/f", arrays=tuple(arrays.values())),
        "latents/l": GroupLayout(path="latents/l", arrays=(moments,)),
    }


def identity(layout: GroupLayout, dtype: str) -> Identity:
    """What readers and the trainer ask of a group."""
    if layout.path == "latents/l":
        return LatentsIdentity(
            name=layout.path,
            latent_channels=4,
            latent_size=(32, 32),
            latent_scale_factor=1.0,
            latent_shift_factor=0.0,
        )
    return FeaturesIdentity(
        name=layout.path, token_grid=(16, 16), width=TOKENS[1], tokens="patch", codec=CODECS[dtype].identity
    )


def write(root: Path, spec: Spec, n_rows: int) -> None:
    """Publish without fsync, since nobody else's writer does it either."""
    keys = [str(row) for row in range(n_rows)]
    dtype = next(dtype for dtype, of_dtype in SPECS.items() if of_dtype == spec)
    with Staging(root) as staging:
        index = make_index(keys, [0] * n_rows, ["x"] * n_rows, keys, [1] * n_rows)
        for path, layout in layouts(spec, n_rows).items():
            create_store(root, layout.store, index, {}, staging.run_id)
            digest = create_group(root, layout, identity(layout, dtype), {}, staging.run_id)
            staging.prepare(path)
            for unit in range(layout.store.n_units):
                rows = layout.store.unit_rows(unit)
                data = make_rows(spec, rows.start, rows.stop)
                arrays = {a.name: data[a.name][:, None] for a in layout.arrays}
                publish_unit(root, layout, digest, unit, arrays, [], staging.run_id, {}, fsync=False)


def batches(
    root: Path, spec: Spec, order: np.ndarray, batch: int, variant: str, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    checksums, n_threads, ahead = VARIANTS[variant]
    store = open_store(root)
    readers: dict[str, ArrayReader] = {}
    for path in ("features/f", "latents/l"):
        readers |= store.group(path, checksums=checksums, n_threads=n_threads).arrays
    out = buffers(spec, batch)
    arrays = {name: tensor.numpy() for name, tensor in out.items()}
    for start in range(0, len(order), batch):
        soon = order[start + batch : start + 2 * batch]
        if ahead:
            for reader in readers.values():
                reader.will_read(soon, 0)
        gather_into([(reader, arrays[name]) for name, reader in readers.items()], order[start : start + batch], 0)
        yield out
