"""A feature file: what one encoder said of N images, as one `.npz`, and what determines its numbers.

    features   float32 (N, D)       one vector an image; distances are measured between these
    spatial    float32 (N, S)       Inception only: what sFID is computed from
    logits     float32 (N, classes) Inception only: what the Inception Score is computed from
    identity   JSON text            name, encoder, SHA-256 of its weights, preprocessing, vector (cls, mean, pool_3)
    images     JSON text            which images: path, how many, a digest of their pixels, which could not be read
    image_keys, image_digests       uint8 (N, 16): of each image where it lies and when it changed, and of its pixels

`python -m pipeline features` writes it and `python -m trainer evaluate` reads it, so that the two need not know each
other. Nothing is pickled; an array is read when it is asked for, and takes the memory that its bytes in the file say.
"""

from __future__ import annotations

import json
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from storage.base.boundary import Count, open_regular, parse_json
from storage.base.errors import UserError
from storage.base.files import make_directories, partial_name, publish
from storage.base.shown import shown
from storage.identity import VectorsIdentity, parse

FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"
RECORDS = ("identity", "images")
MAX_RECORD_BYTES = 64 << 20
MAX_INFLATED_BYTES, MAX_RATIO = 64 << 20, 100  # numbers of an encoder hardly shrink; what shrinks so is no such file


@dataclass(frozen=True)
class _Images:
    n: Count
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A feature file's records; `read` reads its arrays."""

    path: Path
    identity: VectorsIdentity
    images: dict[str, Any]
    arrays: tuple[str, ...]

    @property
    def label(self) -> str:
        """The encoder's name, and which vector it is where that is not its usual one."""
        return f"{self.identity.name}-mean" if self.identity.vector == "mean" else self.identity.name

    def read(self, name: str) -> np.ndarray:
        """An array (N, D) by name. Raises UserError for numbers that are not finite, or not those of N images."""
        array = read_npz_array(self.path, name)
        if array.ndim != 2 or len(array) != self.images["n"] or array.dtype.kind not in "fiu":
            raise UserError(
                f"{name} in {self.path} is {array.dtype} {array.shape}, not a row of numbers for each of the "
                f"{self.images['n']} images; make the file again"
            )
        if not np.isfinite(array).all():
            raise UserError(
                f"{name} in {self.path} hold NaN or infinity; check the encoder's weights, then make it again"
            )
        return array


def write_feature_file(
    path: Path, arrays: Mapping[str, np.ndarray], identity: VectorsIdentity, images: Mapping[str, Any]
) -> None:
    """Write a feature file, whole or not at all. Raises OSError."""
    make_directories(path.absolute().parent)
    temporary = partial_name(path.absolute(), "features")
    try:
        with open(temporary, "xb") as file:
            records = {"identity": np.array(json.dumps(identity.plain())), "images": np.array(json.dumps(images))}
            np.savez(file, allow_pickle=False, **records, **arrays)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path.absolute())
    finally:
        temporary.unlink(missing_ok=True)


def open_feature_file(path: Path) -> FeatureFile:
    """Read a feature file's records. Raises UserError when it is none."""
    names = npz_names(path)
    if not {FEATURES, *RECORDS} <= names:
        raise UserError(
            f"{path} is not a feature file (it holds {held(names)}); make one with "
            f"`python -m pipeline features IMAGES --encoder NAME --out {path}`"
        )
    identity, images = (str(read_npz_array(path, name, MAX_RECORD_BYTES)) for name in RECORDS)
    where, fix = f"the identity in {path}", "make the file again"
    images_known = parse_json(_Images, images, f"the record of images in {path}", fix)
    return FeatureFile(
        path=path,
        identity=parse(VectorsIdentity, parse_json(dict[str, Any], identity, where, fix), where, fix),
        images={"path": images_known.path, **parse_json(dict[str, Any], images, str(path), fix)},
        arrays=tuple(sorted(names.difference(RECORDS))),
    )


def npz_names(path: Path) -> set[str]:
    """Names of the arrays in an `.npz`. Raises UserError when it cannot be read as one."""
    with _archive(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_npz_array(path: Path, name: str, max_bytes: int | None = None) -> np.ndarray:
    """One array of an `.npz`, of at most `max_bytes`. Raises UserError when it is none, or declares more than it holds.

    numpy's own reader takes the memory that an array's header names, before it looks whether there are such bytes.
    """
    with _archive(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        inflates = info.file_size > max(MAX_INFLATED_BYTES, MAX_RATIO * info.compress_size)
        if inflates or (max_bytes is not None and info.file_size > max_bytes):
            raise UserError(f"{name} in {path} would be {info.file_size:,} bytes, too many for what it should be")
        with archive.open(info) as member:
            shape, dtype, fortran = npy_header(member)
            n_bytes = math.prod(shape) * dtype.itemsize
            data = member.read(n_bytes) if n_bytes <= info.file_size else b""
        if len(data) != n_bytes:
            raise UserError(f"{name} in {path} declares {n_bytes:,} bytes and holds fewer; make the file again")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether it is in Fortran order; the file is then at the first number. Raises ValueError."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(member)
    except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError, OverflowError) as error:
        raise ValueError(f"a header that is none ({type(error).__name__})") from None
    if dtype.hasobject or any(side < 0 for side in shape):
        raise ValueError(f"an array of {dtype} {shape}")
    return shape, dtype, fortran


def held(names: set[str]) -> str:
    """The arrays of a file for a message, which may be thousands."""
    shown_names = ", ".join(shown(name)[:40] for name in sorted(names)[:8])
    return f"{shown_names or 'nothing'}{' …' if len(names) > 8 else ''}"


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, opened. Raises UserError when it is none, or what is read inside is not an array."""
    try:
        with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError) as error:
        reason = shown(" ".join(str(error).split()))[:120]
        raise UserError(f"{path} is not an .npz file ({reason}); restore it or make it again") from None
