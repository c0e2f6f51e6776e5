"""HDF5: images as encoded bytes (a data set of variable-length uint8) or as pixels (uint8, N × H × W × 3).

The images are the data set `images` (or `image`), else the only one of such a shape; labels are the data set `labels`
(or `label`), integers or names; class names are the strings of `classes`, or `classes.txt`. Samples are in the order of
the files' names, then of the rows; the key is the file's name without suffix and the row (`train/000123`). A unit reads
consecutive rows in few calls, along the chunks.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import h5py
import numpy as np

from pipeline.sources.files import UNKNOWN_BYTES, File
from pipeline.sources.found import Found, look
from pipeline.sources.listing import Listing, make_listing, number_labels
from pipeline.sources.protocol import Sample, Unreadable
from storage.errors import UserError

SUFFIXES = (".h5", ".hdf5")
IMAGE_NAMES, LABEL_NAMES, CLASS_NAMES = ("images", "image"), ("labels", "label"), "classes"
CALL_BYTES = 32 << 20  # of pixels that are read in one call, unless a chunk is larger


class HDF5:
    """One or more HDF5 files. `location` is `file.h5#row`."""

    kind = "hdf5"
    expects = "HDF5 files (.h5, .hdf5) with the data sets images and labels"

    def __init__(self, found: Found) -> None:
        self.data, self.place = found.data, found.place

    @staticmethod
    def recognises(found: Found) -> bool:
        """By suffix."""
        return bool(found.having(*SUFFIXES))

    def listing(self) -> Listing:
        """List every row. Raises UserError where a file is no such HDF5 file or there is no row."""
        found = look(self.data)
        files = found.one_split(*SUFFIXES)
        keys: list[str] = []
        locations: list[str] = []
        nbytes: list[int] = []
        labels: list[Any] = []
        class_names: dict[int, str] = {}
        for file in files:  # one after the other: h5py holds one lock for all files
            n_rows, image_nbytes, file_labels, file_names = self._read_labels(file)
            keys += [f"{posixpath.splitext(file.path)[0]}/{row:06d}" for row in range(n_rows)]
            locations += [f"{file.path}#{row}" for row in range(n_rows)]
            nbytes += [image_nbytes] * n_rows
            labels += file_labels
            if class_names and file_names != class_names:
                raise UserError(f"DATA {self.data}: {file.path} names its classes differently; precompute it by itself")
            class_names = file_names
        if not keys:
            raise UserError(f"DATA {self.data} has {len(files)} HDF5 files and no row in them")
        numbers, names = number_labels(labels)
        return make_listing(
            keys=keys,
            labels=numbers,
            class_names={**names, **class_names, **found.class_names()},
            locations=locations,
            nbytes=nbytes,
            data_bytes=sum(file.nbytes for file in files),
            left_out=found.left_out(files),
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

    def _read_labels(self, file: File) -> tuple[int, int, list[Any], dict[int, str]]:
        """Rows, bytes an image, labels and class names of a file."""
        where = f"{self.place.root}/{file.path}"
        try:
            with self.place.open(file.path) as handle, h5py.File(handle, "r") as content:
                images = find_images(content)
                n_rows = images.shape[0]
                labels: list[Any] = [None] * n_rows
                for name in LABEL_NAMES:
                    if name in content:
                        labels = [_text(value) for value in content[name][()].tolist()]
                        break
                if len(labels) != n_rows:
                    raise UserError(f"{where} has {n_rows} images and {len(labels)} labels")
                names = content[CLASS_NAMES][()].tolist() if CLASS_NAMES in content else []
                nbytes = int(np.prod(images.shape[1:])) if images.ndim == 4 else UNKNOWN_BYTES
                return n_rows, nbytes, labels, {label: str(_text(name)) for label, name in enumerate(names)}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"{where} is no whole HDF5 file ({' '.join(str(error).split())})") from error


def find_images(file: h5py.File) -> h5py.Dataset:
    """The data set of images. Raises UserError where there is none, or more than one."""
    for name in IMAGE_NAMES:
        if name in file and _holds_images(file[name]):
            return file[name]
    candidates = [dataset for dataset in file.values() if _holds_images(dataset)]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{name} {getattr(d, 'shape', '(group)')} {getattr(d, 'dtype', '')}" for name, d in file.items())
    raise UserError(
        f"it has {len(candidates)} data sets of images and none is named images: variable-length uint8 (N,) or uint8 "
        f"(N, H, W, 3); it has {listed or 'nothing'}"
    )


def _holds_images(dataset: Any) -> bool:
    if not isinstance(dataset, h5py.Dataset):
        return False
    if dataset.ndim == 1:
        return h5py.check_vlen_dtype(dataset.dtype) == np.uint8
    return dataset.ndim == 4 and dataset.shape[-1] == 3 and dataset.dtype == np.uint8


def _sample(row: np.ndarray) -> Sample:
    if row.ndim == 3:
        return row
    return row.tobytes() if len(row) else Unreadable("empty row (0 bytes)")


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _rows_a_call(images: h5py.Dataset) -> int:
    """Whole chunks, since a chunk is read and unpacked whole however little of it is asked for."""
    chunk_rows = images.chunks[0] if images.chunks else 1
    row_bytes = int(np.prod(images.shape[1:])) if images.ndim == 4 else 1 << 18
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
