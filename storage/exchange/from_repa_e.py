"""REPA-E's cached latents (arXiv 2504.10483): NAME.h5, with a data set `00000/img-mean-std-00000000.npy` an image.

Each is (2C, h, w), the posterior's mean and standard deviation, unscaled: the moments of this project. The data set
`dataset.json` holds {"labels": [[name, label], …]} and says which data sets there are; rows are in the order of their
names, as REPA-E's loader sorts them. Flips are not in it.

Its trainer normalises channel by channel with the statistics that lie beside the weights of the autoencoder, in
NAME-latents-stats.pt: that file is taken from beside NAME.h5, or named by --latent-statistics. As there, 1e-4 is added
to the variance, which is its batch norm's ε; it decodes without ε, here the map is the same both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from storage.base.boundary import parse_json
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.exchange.incoming import (
    ImportOptions,
    Incoming,
    latents_alone,
    whole_labels,
)
from storage.hdf5 import find_dataset, hdf5_errors

LABELS = "dataset.json"
EPSILON = 1e-4
MAX_LABELS_BYTES = 512 << 20


@dataclass(frozen=True)
class _Labels:
    """What the data set `dataset.json` holds."""

    labels: list[tuple[str, int | float | str | None]]


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the file; it stays open until the import ends. Raises UserError for another or a damaged one."""
    if source.is_dir():
        with_labels = sorted(path for path in source.glob("*.h5") if (source / f"{path.stem}_h5.json").is_file())
        latents = [path for path in with_labels if path.stem != "images"]
        names = ", ".join(shown(path.name) for path in latents[:4]) or "none"
        raise UserError(f"{source} is a folder; name the file of latents in it (there is {names})")
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise UserError(f"{source} is not an HDF5 file ({str(error).splitlines()[0]})") from error
    try:
        with hdf5_errors(shown(str(source))):
            return _described(file, source, options)
    except UserError:
        file.close()
        raise


def _described(file: h5py.File, source: Path, options: ImportOptions) -> Incoming:
    pairs = _labels(file, source)
    labels = dict(pairs)
    if len(labels) < len(pairs):
        raise UserError(f"its {LABELS} names a data set twice; mend it")
    names = sorted(labels)
    if not names:
        raise UserError(f"its {LABELS} names no data set")
    shape = _one(file, names[0]).shape
    if len(shape) != 3 or shape[0] % 2:
        raise UserError(f"{shown(names[0])!r} has shape {shape}; moments are (2C, h, w), mean and standard deviation")
    numbers = whole_labels([labels[name] for name in names], source)

    def rows(wanted: range) -> dict[str, np.ndarray]:
        with hdf5_errors(shown(str(source))):
            latents = np.empty((len(wanted), 1, *shape), np.float32)
            for i, row in enumerate(wanted):
                data = _one(file, names[row])
                if data.shape != shape:
                    raise UserError(
                        f"{shown(names[row])!r} has shape {data.shape}, the first {shape}; all must be alike"
                    )
                latents[i, 0] = data[()]
            return {"moments": latents}

    return latents_alone(
        source,
        options,
        kind="repa-e",
        what="REPA-E's HDF5 file",
        files=[(source.name, source.stat().st_size)],
        keys=names,
        labels=numbers,
        shape=shape,
        rows=rows,
        scale=1.0,
        beside=source.with_name(f"{source.stem}-latents-stats.pt"),
        epsilon=EPSILON,
    )


def _labels(file: h5py.File, source: Path) -> list[tuple[str, int | float | str | None]]:
    labels = find_dataset(file, LABELS)
    if labels is None:
        raise UserError(f"it has no data set {LABELS!r}, so its labels are unknown; it is not one of REPA-E's files")
    if labels.dtype.kind not in "SO" or labels.size != 1 or labels.dtype.itemsize > MAX_LABELS_BYTES:
        raise UserError(f"its data set {LABELS!r} is {labels.dtype} {labels.shape}, not one text; fetch the file again")
    raw = labels[()] if labels.shape == () else labels[(0,) * len(labels.shape)]
    raw = raw.encode() if isinstance(raw, str) else bytes(raw)
    return parse_json(_Labels, raw, f"{source}, {LABELS}", 'it must be {"labels": [[name, label], …]}').labels


def _one(file: h5py.File, name: str) -> h5py.Dataset:
    dataset = find_dataset(file, name)
    if dataset is None:
        raise UserError(f"it has no data set {shown(name)[:80]!r}, which its {LABELS} names; fetch the file again")
    if dataset.dtype.kind != "f":
        raise UserError(f"{shown(name)[:80]!r} holds {dataset.dtype}, not floating-point numbers; fetch the file again")
    return dataset
