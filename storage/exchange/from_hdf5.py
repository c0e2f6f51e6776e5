"""HDF5: what `export --to hdf5` wrote, bit for bit; or moments in any file, named by --dataset and --labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from storage.errors import UserError
from storage.exchange.incoming import (
    SD_VAE_SCALE,
    ImportOptions,
    Incoming,
    IncomingGroup,
    latents_identity,
    sha256_of_listing,
    whole_labels,
)


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the file; it stays open until the import ends."""
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise UserError(f"{source} is not an HDF5 file ({str(error).splitlines()[0]})") from error
    if options.dataset:
        return _foreign(file, source, options)
    if "offline_repa" not in file.attrs:
        raise UserError(f"{source} was not written by export; name its moments and labels by --dataset and --labels")
    about = json.loads(file.attrs["offline_repa"])
    if about["decoded"] and any("codec" in identity for identity in about["identities"].values()):
        raise UserError(
            f"{source} holds decoded int8 features, which their identity does not describe; export as stored"
        )
    groups = []
    for path, identity in about["identities"].items():
        arrays = {name: (data.dtype.name, tuple(data.shape[2:])) for name, data in file[path].items()}
        own = {name: value for name, value in identity.items() if name not in ("views", "index_digest")}
        groups.append(IncomingGroup(path=path, identity=own, arrays=arrays, rows=_Rows(file, path, tuple(arrays))))
    return Incoming(
        keys=[key.decode() for key in file["key"][:]],
        labels=file["label"][:].tolist(),
        class_names=[name.decode() for name in file["class_name"][:]],
        views=tuple(about["views"]),
        resolution=about["resolution"],
        source={"kind": "hdf5", "path": str(source.absolute())},
        groups=groups,
    )


def _foreign(file: Any, source: Path, options: ImportOptions) -> Incoming:
    for name in (options.dataset, options.labels):
        if not isinstance(file.get(name), h5py.Dataset) if name else True:
            raise UserError(f"{source} has no dataset {name!r}; pass --dataset and --labels as they are in the file")
    data, labels = file[options.dataset], file[options.labels][:]
    shape = data.shape if data.ndim == 5 else (data.shape[0], 1, *data.shape[1:])
    if data.ndim not in (4, 5) or shape[1] not in (1, 2) or shape[2] % 2:
        raise UserError(f"{source}: moments are (N, 2C, h, w) or (N, V, 2C, h, w) with V 1 or 2, got {data.shape}")
    if labels.shape != (shape[0],):
        raise UserError(
            f"{source}: {shape[0]} rows of moments and labels of shape {labels.shape}; they must be one a row"
        )
    group = IncomingGroup(
        path=f"latents/{options.name}",
        identity=latents_identity(
            options,
            what="an HDF5 file",
            sha256=sha256_of_listing([(source.name, source.stat().st_size)]),
            channels=shape[2] // 2,
            size=(shape[3], shape[4]),
            scale=SD_VAE_SCALE,
        ),
        arrays={"moments": ("float16", tuple(shape[2:]))},
        rows=lambda rows: {"moments": data[rows.start : rows.stop].reshape(len(rows), *shape[1:])},
    )
    return Incoming(
        keys=[f"{row:08d}" for row in range(shape[0])],
        labels=whole_labels(labels, source),
        class_names=[str(label) for label in labels.tolist()],
        views=("original", "hflip")[: shape[1]],
        resolution=options.resolution,
        source={"kind": "hdf5", "path": str(source.absolute())},
        groups=[group],
    )


class _Rows:
    """Rows of every array of a group in the file."""

    def __init__(self, file: Any, path: str, names: tuple[str, ...]) -> None:
        self._file, self._path, self._names = file, path, names

    def __call__(self, rows: range) -> dict[str, np.ndarray]:
        return {name: self._file[f"{self._path}/{name}"][rows.start : rows.stop] for name in self._names}
