"""A feature file: what one encoder said of N images, as one `.npz`, and what determines its numbers.

    features   float32 (N, D)       one vector an image; distances are measured between these
    spatial    float32 (N, S)       Inception only: what sFID is computed from
    logits     float32 (N, classes) Inception only: what the Inception Score is computed from
    identity   JSON text            name, encoder, SHA-256 of its weights, preprocessing, vector (cls, mean, pool_3)
    images     JSON text            which images: path, how many, a digest of their names, sizes and times

`python -m pipeline features` writes it and `python -m trainer evaluate` reads it, so that the two need not know each
other. Nothing is pickled; an array is read when it is asked for.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import UserError
from storage.files import make_directories, partial_name, publish

FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A feature file's records; `read` reads its arrays."""

    path: Path
    identity: dict[str, Any]
    images: dict[str, Any]
    arrays: tuple[str, ...]

    @property
    def label(self) -> str:
        """The encoder's name, and which vector it is where that is not its usual one."""
        name, vector = self.identity["name"], self.identity["vector"]
        return f"{name}-mean" if vector == "mean" else name

    def read(self, name: str) -> np.ndarray:
        """An array by name. Raises UserError for numbers that are not finite."""
        with np.load(self.path, allow_pickle=False) as file:
            array = file[name]
        if not np.isfinite(array).all():
            raise UserError(
                f"{name} in {self.path} hold NaN or infinity; check the encoder's weights, then make it again"
            )
        return array


def write_feature_file(
    path: Path, arrays: Mapping[str, np.ndarray], identity: Mapping[str, Any], images: Mapping[str, Any]
) -> None:
    """Write a feature file, whole or not at all. Raises OSError."""
    make_directories(path.absolute().parent)
    temporary = partial_name(path.absolute(), "features")
    try:
        with open(temporary, "xb") as file:
            records = {"identity": np.array(json.dumps(identity)), "images": np.array(json.dumps(images))}
            np.savez(file, allow_pickle=False, **records, **arrays)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path.absolute())
    finally:
        temporary.unlink(missing_ok=True)


def open_feature_file(path: Path) -> FeatureFile:
    """Read a feature file's records. Raises UserError when it is none."""
    names = npz_names(path)
    if not {FEATURES, "identity", "images"} <= names:
        raise UserError(
            f"{path} is not a feature file (it holds {', '.join(sorted(names))}); make one with "
            f"`python -m pipeline features IMAGES --encoder NAME --out {path}`"
        )
    with np.load(path, allow_pickle=False) as file:
        identity, images = (json.loads(str(file[name])) for name in ("identity", "images"))
    return FeatureFile(
        path=path, identity=identity, images=images, arrays=tuple(sorted(names - {"identity", "images"}))
    )


def npz_names(path: Path) -> set[str]:
    """Names of the arrays in an `.npz`. Raises UserError when it cannot be read as one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is not an .npz file ({error}); restore it or make it again") from None
