"""HDF5: what `export --to hdf5` wrote, bit for bit; or moments in any file, named by --dataset and --labels.

The file may come from anybody: data sets whose bytes lie in other files are refused (`storage/hdf5.py`), and so are
groups that would lie outside the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from storage.base.boundary import parse_json
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.codecs import codec_of
from storage.exchange.incoming import (
    SD_VAE_SCALE,
    ImportOptions,
    Incoming,
    IncomingGroup,
    latents_alone,
    whole_labels,
)
from storage.hdf5 import find_dataset, find_member, hdf5_errors, read_column
from storage.metadata import group_identity

ABOUT = "offline_repa"
GROUP = re.compile(r"(latents|features)/[^/.][^/]*")
EXPORT_AGAIN = "export it again"


@dataclass(frozen=True, kw_only=True)
class About:
    """The attribute that `export` writes."""

    views: list[str]
    resolution: int
    decoded: bool
    identities: dict[str, dict[str, Any]]


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the file; it stays open until the import ends. Raises UserError for another or a damaged one."""
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise UserError(f"{source} is not an HDF5 file ({str(error).splitlines()[0]})") from error
    try:
        with hdf5_errors(shown(str(source))):
            return _foreign(file, source, options) if options.dataset else _exported(file, source)
    except UserError:
        file.close()
        raise


def _exported(file: h5py.File, source: Path) -> Incoming:
    if ABOUT not in file.attrs:
        raise UserError("it was not written by export; name its moments and labels by --dataset and --labels")
    raw = file.attrs[ABOUT]
    if not isinstance(raw, str):
        raise UserError(f"its attribute {ABOUT} is no text; {EXPORT_AGAIN}")
    about = parse_json(About, raw, f"attribute {ABOUT}", EXPORT_AGAIN)
    columns = {name: _named_dataset(file, name) for name in ("key", "label", "class_name")}
    n_rows = columns["key"].shape[0] if columns["key"].shape else 0
    keys, labels, class_names = (read_column(column, n_rows) for column in columns.values())
    groups = []
    for path, stored in about.identities.items():
        group = find_member(file, path) if GROUP.fullmatch(path) else None
        if not isinstance(group, h5py.Group):
            raise UserError(
                f"its attribute {ABOUT} names {shown(path)[:80]!r}, which is no group of arrays; {EXPORT_AGAIN}"
            )
        identity = group_identity(path, stored, f"attribute {ABOUT}, {path}")
        if about.decoded and identity.codec is not None:
            raise UserError(f"{path} was decoded, which its identity does not describe; export as stored")
        if codec_of(identity, path).keyed and _whole_rows(file) != n_rows:
            raise UserError(
                f"{path} is in a codec that is keyed by the row, and the file has a part of the rows; export all rows"
            )
        datasets = {str(name): _named_dataset(group, name) for name in group}
        arrays = {name: (data.dtype.name, tuple(data.shape[2:])) for name, data in datasets.items()}
        groups.append(IncomingGroup(path=path, identity=identity, arrays=arrays, rows=_Rows(datasets)))
    return Incoming(
        keys=[str(key) for key in keys],
        labels=whole_labels(labels, source),
        class_names=[str(name) for name in class_names],
        views=tuple(about.views),
        resolution=about.resolution,
        source={"kind": "hdf5", "path": str(source.absolute())},
        groups=groups,
    )


def _whole_rows(file: h5py.File) -> int:
    """How many rows the file has, if they are 0, 1, 2, …, else −1."""
    rows = read_column(_named_dataset(file, "row"), len(file["row"]))
    return len(rows) if rows == list(range(len(rows))) else -1


def _named_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    dataset = find_dataset(group, name)
    if dataset is None:
        raise UserError(f"it has no data set {name!r}; {EXPORT_AGAIN}")
    return dataset


def _foreign(file: h5py.File, source: Path, options: ImportOptions) -> Incoming:
    named = [find_dataset(file, name) if name else None for name in (options.dataset, options.labels)]
    for name, member in zip((options.dataset, options.labels), named, strict=True):
        if member is None:
            raise UserError(f"it has no dataset {name!r}; pass --dataset and --labels as they are in the file")
    data, label_column = named
    assert data is not None and label_column is not None  # noqa: PT018
    shape = data.shape if data.ndim == 5 else (data.shape[0], 1, *data.shape[1:]) if data.ndim else ()
    if data.ndim not in (4, 5) or shape[1] not in (1, 2) or shape[2] % 2:
        raise UserError(f"moments are (N, 2C, h, w) or (N, V, 2C, h, w) with V 1 or 2, got {data.shape}")
    labels = whole_labels(read_column(label_column, shape[0]), source)
    return latents_alone(
        source,
        options,
        kind="hdf5",
        what="an HDF5 file",
        files=[(source.name, source.stat().st_size)],
        keys=[f"{row:08d}" for row in range(shape[0])],
        labels=labels,
        views=("original", "hflip")[: shape[1]],
        shape=tuple(shape[2:]),
        rows=lambda rows: {"moments": data[rows.start : rows.stop].reshape(len(rows), *shape[1:])},
        scale=SD_VAE_SCALE,
    )


class _Rows:
    """Rows of every array of a group in the file."""

    def __init__(self, datasets: dict[str, h5py.Dataset]) -> None:
        self._datasets = datasets

    def __call__(self, rows: range) -> dict[str, np.ndarray]:
        return {name: data[rows.start : rows.stop] for name, data in self._datasets.items()}
