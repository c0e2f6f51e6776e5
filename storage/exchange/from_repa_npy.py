"""The `vae-sd` folder that the public REPA code trains from, as the EDM2 dataset tools write it.

`dataset.json` holds {"labels": [[file, label], …]}; each file is (8, 32, 32) float32 at 256 px, the posterior's mean
and standard deviation of the Stable Diffusion VAE, unscaled: the moments of this project, rounded to float16.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from storage.base.boundary import open_regular, parse_json, read_regular
from storage.base.errors import UserError
from storage.base.files import walk_files
from storage.exchange.incoming import (
    SD_VAE_SCALE,
    ImportOptions,
    Incoming,
    latents_alone,
    require_folder,
    whole_labels,
)

MAX_DATASET_JSON_BYTES = 256 << 20  # 200 bytes an image of ImageNet


@dataclass(frozen=True)
class _Dataset:
    """What dataset.json holds."""

    labels: list[tuple[str, int | float | str | None]]


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the folder. Raises UserError unless every file that dataset.json names is there, and no other `.npy`."""
    require_folder(source, "folder that holds dataset.json and 00000/, 00001/, …")
    where = source / "dataset.json"
    try:
        raw = read_regular(where, MAX_DATASET_JSON_BYTES)
    except FileNotFoundError:
        raise UserError(
            f"{source} has no dataset.json, so its labels are unknown; copy it beside the folders"
        ) from None
    pairs = parse_json(_Dataset, raw, str(where), 'it must be {"labels": [[file, label], …]}').labels
    labels = dict(pairs)
    if len(labels) < len(pairs):
        raise UserError(f"{where} names a file twice; mend it")
    sizes = {name: (source / name).stat().st_size for name in walk_files(source) if name.endswith(".npy")}
    names = sorted(labels)
    for only, fix in ((set(names) - sizes.keys(), "is missing"), (sizes.keys() - labels.keys(), "has no label")):
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise UserError(f"{source / min(only)}{more} {fix}; make files and dataset.json agree")
    if not names:
        raise UserError(f"{where} names no file")
    shape = _load(source / names[0]).shape
    if len(shape) != 3 or shape[0] % 2:
        raise UserError(f"{source / names[0]} has shape {shape}; moments are (2C, h, w), mean and standard deviation")
    numbers = whole_labels([labels[name] for name in names], where)
    return latents_alone(
        source,
        options,
        kind="repa-npy",
        what="a vae-sd folder",
        files=((name, sizes[name]) for name in names),
        keys=names,
        labels=numbers,
        shape=shape,
        rows=lambda rows: {"moments": np.stack([_one(source / names[row], shape) for row in rows])[:, None]},
        scale=SD_VAE_SCALE,
    )


def _one(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    values = _load(path)
    if values.shape != shape:
        raise UserError(f"{path} has shape {values.shape}, the first file {shape}; all must be alike")
    return values


def _load(path: Path) -> np.ndarray:
    """The array, of as many bytes as its header says: memory goes with the file."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(file)
            left = os.fstat(file.fileno()).st_size - file.tell()
            if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != left:
                raise ValueError(f"its header says {dtype} {shape}, and {left} bytes follow")
            file.seek(0)
            return npy.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, MemoryError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a .npy file ({first})") from error
