"""How latents are normalised channel by channel, as an identity says it: z = (x − mean) / std · latent_scale_factor.

The field `latent_normalisation` of a `LatentsIdentity` holds {"mean": […], "std": […], "source": "…"}, a number a
channel, and `"patch": p` where statistics are of the p × p pixels of a patch, as Flux.2's are: number (c·p + i)·p + j
is then of channel c at rows i, i + p, … and columns j, j + p, …. Where it stands, there is no shift. A group without it
is normalised by one factor and one shift, as ever, and its digest is what it was.

Statistics decide what a model learns and how its latents are decoded, so they are hashed with the rest. `source` says
in words what they were read from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from storage.base.boundary import parse_json
from storage.base.errors import StoreError, UserError
from storage.identity import LatentsIdentity

FIX = "use another copy of the store, or import the latents again"


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and deviation of C·p·p channels, and where they are from."""

    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    source: str
    patch: Annotated[int, Field(ge=1, le=64)] = 1

    def plain(self) -> dict[str, Any]:
        """What an identity holds."""
        plain: dict[str, Any] = {"mean": list(self.mean), "std": list(self.std), "source": self.source}
        return plain | ({"patch": self.patch} if self.patch > 1 else {})

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, float64 (C, p, p)."""
        mean, std = (
            np.array(values, np.float64).reshape(-1, self.patch, self.patch) for values in (self.mean, self.std)
        )
        return mean, std


def normalisation_of(identity: LatentsIdentity) -> Normalisation | None:
    """What an identity says, None where one factor normalises all channels.

    Raises StoreError where the statistics are not of the identity's channels.
    """
    if identity.latent_normalisation is None:
        return None
    what = f"the latent_normalisation of {identity.name or 'latents'}"
    statistics = parse_json(Normalisation, json.dumps(identity.latent_normalisation), what, FIX)
    n, sides = (identity.latent_channels or 0) * statistics.patch**2, identity.latent_size or (0, 0)
    if (len(statistics.mean), len(statistics.std)) != (n, n) or any(side % statistics.patch for side in sides):
        raise StoreError(
            f"{what} has {len(statistics.mean)} means and {len(statistics.std)} deviations of patches of "
            f"{statistics.patch}; "
            f"{identity.latent_channels} channels of {sides[0]}×{sides[1]} need {n}; {FIX}"
        )
    if identity.latent_shift_factor:
        raise StoreError(f"{what} stands beside a latent_shift_factor of {identity.latent_shift_factor}; {FIX}")
    return statistics


def made(
    mean: Iterable[float], std: Iterable[float], *, channels: int, source: str, where: str, of_patches: bool = False
) -> Normalisation:
    """Statistics that a file says, checked. Raises UserError where they are not `channels` numbers, or not usable.

    `of_patches`: p² numbers a channel are of patches of p × p, as Flux.2's are.
    """
    means, stds = tuple(map(float, mean)), tuple(map(float, std))
    patch = math.isqrt(len(means) // channels) if of_patches and channels else 1
    if not means or len(means) != len(stds) or len(means) != channels * patch**2:
        raise UserError(
            f"{where} has {len(means)} means and {len(stds)} deviations, and the latents {channels} channels; use the "
            "statistics of these latents"
        )
    wrong = [i for i, (m, s) in enumerate(zip(means, stds, strict=True)) if not (math.isfinite(m) and 0 < s < math.inf)]
    if wrong:
        i = wrong[0]
        raise UserError(
            f"{where}: channel {i} has mean {means[i]} and deviation {stds[i]}; a mean must be finite and a deviation "
            "above 0: use the statistics of these latents"
        )
    return Normalisation(mean=means, std=stds, source=source, patch=patch)
