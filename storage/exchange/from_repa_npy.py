"""The `vae-sd` folder that the public REPA code trains from, as the EDM2 dataset tools write it.

`dataset.json` holds {"labels": [[file, label], …]}; each file is (8, 32, 32) float32 at 256 px, the posterior's mean
and standard deviation of the Stable Diffusion VAE, unscaled: the moments of this project, rounded to float16.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from storage.errors import UserError
from storage.exchange.incoming import (
    SD_VAE_SCALE,
    ImportOptions,
    Incoming,
    IncomingGroup,
    latents_identity,
    require_folder,
    sha256_of_listing,
    whole_labels,
)
from storage.files import walk_files


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the folder; every file that dataset.json names must be there, and no other `.npy`."""
    require_folder(source, "folder that holds dataset.json and 00000/, 00001/, …")
    try:
        labels = dict(json.loads((source / "dataset.json").read_bytes())["labels"])
    except FileNotFoundError:
        raise UserError(
            f"{source} has no dataset.json, so its labels are unknown; copy it beside the folders"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{source / "dataset.json"} is not {{"labels": [[file, label], …]}} ({error!r})') from error
    there = {name: (source / name).stat().st_size for name in walk_files(source) if name.endswith(".npy")}
    names = sorted(labels)
    for only, fix in ((set(names) - there.keys(), "is missing"), (there.keys() - labels.keys(), "has no label")):
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise UserError(f"{source / min(only)}{more} {fix}; make files and dataset.json agree")
    if not names:
        raise UserError(f"{source / 'dataset.json'} names no file")
    shape = _load(source / names[0]).shape
    if len(shape) != 3 or shape[0] % 2:
        raise UserError(f"{source / names[0]} has shape {shape}; moments are (2C, h, w), mean and standard deviation")
    group = IncomingGroup(
        path=f"latents/{options.name}",
        identity=latents_identity(
            options,
            what="a vae-sd folder",
            sha256=sha256_of_listing((name, there[name]) for name in names),
            channels=shape[0] // 2,
            size=(shape[1], shape[2]),
            scale=SD_VAE_SCALE,
        ),
        arrays={"moments": ("float16", shape)},
        rows=lambda rows: {"moments": np.stack([_one(source / names[row], shape) for row in rows])[:, None]},
    )
    return Incoming(
        keys=names,
        labels=whole_labels([labels[name] for name in names], source / "dataset.json"),
        class_names=[str(labels[name]) for name in names],
        views=("original",),
        resolution=options.resolution,
        source={"kind": "repa-npy", "path": str(source.absolute())},
        groups=[group],
    )


def _one(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    values = _load(path)
    if values.shape != shape:
        raise UserError(f"{path} has shape {values.shape}, the first file {shape}; all must be alike")
    return values


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a .npy file ({str(error).splitlines()[0]})") from error
