"""What generated images are compared with, told by what a path holds.

    .npz with `mu` and `sigma`         ADM's reference batch: statistics of the whole data set, and of its spatial
      (`mu_s`, `sigma_s`, `arr_0`)     features; precision and recall need its images too
    feature file                       what `python -m pipeline features` wrote, for this encoder
    .npz with `arr_0`, folder, store   images; they are described by the encoder first

Statistics in a reference batch are Inception's; another encoder uses its images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.errors import UserError
from storage.feature_file import FEATURES, npz_names
from storage.roots import is_url
from trainer.evaluation.frechet import Gaussian

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
    found = Contents(
        statistics={MEAN, COVARIANCE} <= names, features={FEATURES, "identity"} <= names, images=IMAGES in names
    )
    if found == Contents():
        raise UserError(f"{path} holds {', '.join(sorted(names))}; {_choices()}")
    return found


def read_statistics(path: Path) -> tuple[Gaussian, Gaussian | None]:
    """A reference batch's statistics: of the pooled features, and of the spatial ones if it has them."""
    with np.load(path, allow_pickle=False) as file:
        pooled = Gaussian(mean=file[MEAN].astype(np.float64), covariance=file[COVARIANCE].astype(np.float64))
        if SPATIAL_MEAN not in file.files or SPATIAL_COVARIANCE not in file.files:
            return pooled, None
        spatial = Gaussian(
            mean=file[SPATIAL_MEAN].astype(np.float64), covariance=file[SPATIAL_COVARIANCE].astype(np.float64)
        )
    return pooled, spatial


def _choices() -> str:
    return (
        f"name a folder of images, a store, an .npz with {IMAGES} or with {MEAN} and {COVARIANCE} (ADM's layout), or a "
        "feature file"
    )
