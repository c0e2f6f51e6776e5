"""HDF5: images as encoded bytes (a data set of variable-length uint8) or as pixels (uint8, N × H × W × 3).

The images are the data set `images` (or `image`), else the only one of such a shape; labels are the data set `labels`
(or `label`, or the one that --label-column names), numbers or names of shape (N,) or (N, 1); class names are the
strings of `classes`, or `classes.txt`. Samples are in the order of the files' names, then of the rows; the key is the
file's name without suffix and the row (`train/000123`). A unit reads consecutive rows in few calls, along the chunks.
Data sets whose bytes lie in other files are refused (`storage/hdf5.py`).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import h5py
import numpy as np

from pipeline.sources.data_entries import DataEntries, list_entries
from pipeline.sources.files import UNKNOWN_BYTES, File
from pipeline.sources.labels import AS_FOUND, Label, LabelOptions
from pipeline.sources.listing import Listing, make_listing
from pipeline.sources.protocol import MAX_SAMPLE_BYTES, Sample, Unreadable, too_large
from storage.base.errors import UserError
from storage.hdf5 import (
    MAX_CHUNK_BYTES,
    describe,
    find_dataset,
    find_member,
    hdf5_errors,
    is_virtual,
    read_column,
    require_own,
    rows_of_any_length,
)

SUFFIXES = (".h5", ".hdf5")
IMAGE_NAMES, LABEL_NAMES, CLASS_NAMES = ("images", "image"), ("labels", "label"), "classes"
CALL_BYTES = 32 << 20  # of pixels that are read in one call, unless a chunk is larger


class HDF5:
    """One or more HDF5 files. `location` is `file.h5#row`."""

    kind = "hdf5"
    expects = "HDF5 files (.h5, .hdf5) with the data sets images and labels"

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By suffix."""
        return bool(entries.having(*SUFFIXES))

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every row. Raises UserError where a file is no such HDF5 file or there is no row."""
        entries = list_entries(self.data)
        files = entries.one_split(*SUFFIXES)
        keys: list[str] = []
        locations: list[str] = []
        nbytes: list[int] = []
        labels: list[Label] = []
        class_names: dict[int, str] = {}
        for file in files:  # one after the other: h5py holds one lock for all files
            n_rows, image_nbytes, file_labels, file_names = self._read_labels(file, wanted)
            keys += [f"{posixpath.splitext(file.path)[0]}/{row:06d}" for row in range(n_rows)]
            locations += [f"{file.path}#{row}" for row in range(n_rows)]
            nbytes += [image_nbytes] * n_rows
            if labels and file_names != class_names:
                raise UserError(f"DATA {self.data}: {file.path} names its classes differently; precompute it by itself")
            class_names = file_names
            labels += file_labels
        if not keys:
            raise UserError(f"DATA {self.data} has {len(files)} HDF5 files and no row in them")
        return make_listing(
            keys=keys,
            labels=labels,
            class_names={**class_names, **entries.class_names()},
            locations=locations,
            nbytes=nbytes,
            data_bytes=sum(file.nbytes for file in files),
            left_out=entries.left_out(files),
            wanted=wanted,
            looked_in=self._looked_in(files[0], wanted),
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The rows: bytes, or pixels; consecutive rows are read together."""
        wanted = [(path, int(row)) for path, _, row in (location.rpartition("#") for location in locations)]
        for path, of_file in groupby(wanted, key=lambda where: where[0]):
            with self.place.open(path) as handle, h5py.File(handle, "r") as file:
                images = find_images(file)
                for start, stop in _calls([row for _, row in of_file], _rows_a_call(images)):
                    yield from (_sample(row) for row in images[start:stop])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path, pattern or URL."""
        return {"kind": self.kind, "path": self.data}

    def _read_labels(self, file: File, wanted: LabelOptions) -> tuple[int, int, list[Label], dict[int, str]]:
        """Rows, bytes an image, labels and class names of a file."""
        with self._open(file) as content:
            images = find_images(content)
            n_rows = images.shape[0]
            if file.nbytes >= 0 and n_rows > file.nbytes:
                raise UserError(f"{images.name} has {n_rows:,} rows in a file of {file.nbytes:,} bytes")
            column = None if wanted.unlabelled else find_labels(content, wanted.column)
            labels: list[Label] = [None] * n_rows if column is None else read_column(column, n_rows)
            classes = None if wanted.unlabelled else find_dataset(content, CLASS_NAMES)
            names = [] if classes is None else read_column(classes, classes.shape[0] if classes.shape else 0)
            nbytes = int(np.prod(images.shape[1:])) if images.ndim == 4 else UNKNOWN_BYTES
            return n_rows, nbytes, labels, {label: str(name) for label, name in enumerate(names)}

    def _looked_in(self, file: File, wanted: LabelOptions) -> str:
        """What there is where the labels should be, for a message."""
        with self._open(file) as content:
            name = wanted.column or " or ".join(LABEL_NAMES)
            return f"{self.place.root}/{file.path}, data set {name}; the file holds {describe(content)}"

    @contextmanager
    def _open(self, file: File) -> Iterator[h5py.File]:
        with (
            hdf5_errors(f"{self.place.root}/{file.path}"),
            self.place.open(file.path) as handle,
            h5py.File(handle, "r") as content,
        ):
            yield content


def find_labels(file: h5py.File, column: str) -> h5py.Dataset | None:
    """The data set of labels: the one that is named, else the one of the usual names; None where there is none.

    Raises UserError where the named one is not there, or where the choice would be a guess.
    """
    if column:
        if (dataset := find_dataset(file, column)) is None:
            raise UserError(f"there is no data set {column!r} (--label-column); the file holds {describe(file)}")
        return dataset
    names = [name for name in LABEL_NAMES if find_member(file, name) is not None]
    if len(names) > 1:
        raise UserError(f"it has the data sets {' and '.join(names)}; name the one that holds labels by --label-column")
    if names and isinstance(group := find_member(file, names[0]), h5py.Group):
        raise UserError(
            f"{names[0]} is a group, of {describe(group)}; name the one that holds labels by "
            f"--label-column {names[0]}/NAME"
        )
    return find_dataset(file, names[0]) if names else None


def find_images(file: h5py.File) -> h5py.Dataset:
    """The data set of images. Raises UserError where there is none, or more than one."""
    named = [dataset for name in IMAGE_NAMES if _may_hold_images(dataset := find_member(file, name))]
    candidates = named or [dataset for name in file if _may_hold_images(dataset := _member_of_its_own(file, name))]
    if len(candidates) != 1:
        raise UserError(
            f"it has {len(candidates)} data sets of images, expected one named images: variable-length uint8 (N,) or "
            f"uint8 (N, H, W, 3); it has {describe(file)}{_transposed(file)}"
        )
    (images,) = candidates
    require_own(images)
    if images.ndim == 4 and not 0 < np.prod(images.shape[1:], dtype=float) <= MAX_CHUNK_BYTES:
        raise UserError(
            f"{images.name} has images of {images.shape[2]}×{images.shape[1]} pixels; repack it with usual ones"
        )
    return images


def _member_of_its_own(file: h5py.File, name: str) -> Any:
    """A member, None where it leads out of the file: only one that is named like images is refused for it."""
    try:
        member = find_member(file, name)
    except UserError:
        return None
    return None if isinstance(member, h5py.Dataset) and is_virtual(member) else member


def _may_hold_images(dataset: Any) -> bool:
    """By type and dimensions. A virtual data set is taken by its type: asking for its shape would open other files."""
    if not isinstance(dataset, h5py.Dataset):
        return False
    encoded, virtual = h5py.check_vlen_dtype(dataset.dtype) == np.uint8, is_virtual(dataset)
    if not encoded and dataset.dtype != np.uint8:
        return False
    return virtual or (dataset.ndim == 1 if encoded else dataset.ndim == 4 and dataset.shape[-1] == 3)


def _transposed(file: h5py.File) -> str:
    """What to do about images (N, 3, H, W), for a message."""
    for name in IMAGE_NAMES:
        member = _member_of_its_own(file, name)
        if isinstance(member, h5py.Dataset) and member.ndim == 4 and member.shape[1] == 3:
            return f"; store {name} with the channels last, as uint8"
    return ""


def _sample(row: np.ndarray) -> Sample:
    if row.ndim == 3:
        return row
    if row.nbytes > MAX_SAMPLE_BYTES:
        return too_large(row.nbytes)
    return row.tobytes() if len(row) else Unreadable("empty row (0 bytes)")


def _rows_a_call(images: h5py.Dataset) -> int:
    """Whole chunks, since a chunk is read and unpacked whole however little of it is asked for, within bounds.

    Encoded images: as many as `storage.hdf5.rows_of_any_length` says.
    """
    if images.ndim == 1:
        return rows_of_any_length(images.file.id.get_filesize())
    chunk_rows = images.chunks[0] if images.chunks else 1
    row_bytes = int(np.prod(images.shape[1:]))
    if chunk_rows * row_bytes > MAX_CHUNK_BYTES:
        return max(1, CALL_BYTES // row_bytes)
    return int(chunk_rows * max(1, CALL_BYTES // (row_bytes * chunk_rows)))


def _calls(rows: Sequence[int], rows_a_call: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs [start, stop) of consecutive ones that do not cross a multiple of `rows_a_call`."""
    start = stop = rows[0]
    for row in rows:
        if row != stop or (row % rows_a_call == 0 and row > start):
            yield start, stop
            start = row
        stop = row + 1
    yield start, stop
