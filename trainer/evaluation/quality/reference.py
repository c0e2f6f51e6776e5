"""What generated images are compared with, told by what a path holds.

    .npz with `mu` and `sigma`         ADM's reference batch: statistics of the whole data set, and of its spatial
      (`mu_s`, `sigma_s`, `arr_0`)     features; precision and recall need its images too
    feature file                       what `python -m pipeline features` wrote, for this encoder
    .npz with `arr_0`, folder, store   images; they are described by the encoder first

Statistics in a reference batch are Inception's; another encoder uses its images, unless the file is named for it:
NAME-ENCODER.npz holds that encoder's own `mu` and `sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.base.errors import UserError
from storage.feature_file import FEATURES, held, npz_names, read_npz_array
from storage.roots import is_url
from trainer.evaluation.quality.frechet import Gaussian

MEAN, COVARIANCE, SPATIAL_MEAN, SPATIAL_COVARIANCE, IMAGES = "mu", "sigma", "mu_s", "sigma_s", "arr_0"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a path holds: statistics, features, or images (one of which a reference batch has besides statistics)."""

    statistics: bool = False
    features: bool = False
    images: bool = False


def contents(where: Path | str) -> Contents:
    """Look at a path, or at a store's URL. Raises UserError when there is nothing that can be compared."""
    path = Path(where)
    if is_url(str(where)) or path.is_dir():
        return Contents(images=True)
    if path.suffix != ".npz":
        raise UserError(
            f"{path} {'is' if path.exists() else 'does not exist and is'} no folder and no .npz; {_choices()}"
        )
    names = npz_names(path)
    in_file = Contents(
        statistics={MEAN, COVARIANCE} <= names, features={FEATURES, "identity"} <= names, images=IMAGES in names
    )
    if in_file == Contents():
        raise UserError(f"{path} holds {held(names)}; {_choices()}")
    return in_file


def is_named_for(path: Path, encoder: str) -> bool:
    """Whether statistics are of an encoder, by the file's name."""
    return path.stem == encoder or path.stem.endswith(f"-{encoder}")


def read_statistics(path: Path) -> tuple[Gaussian, Gaussian | None]:
    """A reference batch's statistics: of the pooled features, and of the spatial ones if it has them.

    Raises UserError for what is no mean and covariance.
    """
    spatial = None
    if {SPATIAL_MEAN, SPATIAL_COVARIANCE} <= npz_names(path):
        spatial = _gaussian(path, SPATIAL_MEAN, SPATIAL_COVARIANCE)
    return _gaussian(path, MEAN, COVARIANCE), spatial


def _gaussian(path: Path, mean: str, covariance: str) -> Gaussian:
    arrays = [read_npz_array(path, name) for name in (mean, covariance)]
    if any(array.dtype.kind not in "fiu" or array.size == 0 for array in arrays):
        raise UserError(f"{mean} and {covariance} in {path} are not numbers; restore the file")
    try:
        return Gaussian(mean=arrays[0].astype(np.float64), covariance=arrays[1].astype(np.float64))
    except UserError as error:
        raise UserError(f"{mean} and {covariance} in {path}: {error}") from None


def _choices() -> str:
    return (
        f"name a folder of images, a store, an .npz with {IMAGES} or with {MEAN} and {COVARIANCE} (ADM's layout), or a "
        "feature file"
    )
