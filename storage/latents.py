"""From stored moments to the latents that a model is trained on: the one place where the formula stands.

    x = mean + std · ε              ε standard normal, drawn afresh at every visit; "mean" takes ε = 0
    z = (x − shift) · scale         one number each, or one a channel (`storage/normalisation.py`)

Of an autoencoder without a posterior, x is what is stored. `to_latents` does that with NumPy, its namesake of
`storage.torch` with tensors where they are, and the trainer with draws of its own, keyed by row; all three through
`from_posterior` and `normalised`, whose operators are those of arrays and of tensors alike.

Shape legend: B samples, C channels of (h, w). Statistics of patches have p × p numbers a channel.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np

from storage.base.errors import UserError
from storage.identity import Identity, LatentsIdentity
from storage.normalisation import Normalisation, normalisation_of

MEAN: Literal["mean"] = "mean"
Array = TypeVar("Array")  # of numbers, NumPy's or torch's


def to_latents(
    moments: np.ndarray, identity: Identity, draw: np.random.Generator | Literal["mean"], *, normalise: bool = True
) -> np.ndarray:
    """Latents float32 (B, C, h, w) of stored `moments` (B, 2C, h, w), or (B, C, h, w) where there is no posterior.

    `identity` is that of the group they were read from; `draw` is a generator of ε, or "mean" for none. Without
    `normalise` latents are as the autoencoder's decoder takes them. Raises UserError for moments of another shape than
    the identity says, an identity that is not of latents, and any other `draw`.

    >>> import numpy as np
    >>> from storage import open_store, to_latents
    >>> group = open_store("stores/photos").group("latents/tiny-vae")
    >>> moments = group.gather([0, 1], 0)["moments"]
    >>> to_latents(moments, group.identity, np.random.default_rng(0)).shape
    (2, 4, 16, 16)
    >>> z = to_latents(moments, group.identity, "mean")
    >>> np.allclose(z, moments[:, :4] * group.identity.latent_scale_factor, atol=1e-6)
    True
    """
    of = latents_of(identity, moments.shape)
    x = moments.astype(np.float32)
    if of.has_posterior:
        mean, std = np.split(x, 2, axis=1)
        if draw == MEAN:
            x = mean
        elif isinstance(draw, np.random.Generator):
            x = from_posterior(mean, std, draw.standard_normal(mean.shape, dtype=np.float32))
        else:
            raise refused(draw, "numpy.random.Generator")
    if not normalise:
        return x
    shift, scale = (
        number if isinstance(number, float) else number.astype(np.float32) for number in shift_and_scale(of)
    )
    return normalised(x, spread(shift, x), spread(scale, x))


def from_posterior(mean: Array, std: Array, noise: Array) -> Array:
    """x = mean + std · ε."""
    return mean + std * noise  # type: ignore[operator]


def normalised(x: Array, shift: Any, scale: Any) -> Array:
    """z = (x − shift) · scale, what the model has."""
    return (x - shift) * scale


def stored(z: Array, shift: Any, scale: Any) -> Array:
    """x = z / scale + shift, what the autoencoder decodes."""
    return z / scale + shift


def spread(numbers: Any, over: Any) -> Any:
    """A number as it is; (1, C, p, p) of them laid over (B, C, h, w), patch by patch."""
    if isinstance(numbers, int | float) or numbers.shape[-1] == 1:
        return numbers
    times = (1, 1, over.shape[-2] // numbers.shape[-2], over.shape[-1] // numbers.shape[-1])
    return np.tile(numbers, times) if isinstance(numbers, np.ndarray) else numbers.repeat(times)


def shift_and_scale(identity: LatentsIdentity) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Of an identity: its shift and factor, or where it has statistics float64 (1, C, p, p). Raises StoreError."""
    statistics = normalisation_of(identity)
    if statistics is None:
        return float(identity.latent_shift_factor), float(identity.latent_scale_factor)
    return of_statistics(statistics, identity.latent_scale_factor)


def of_statistics(statistics: Normalisation, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale float64 (1, C, p, p): z = (x − mean) / std · factor."""
    mean, std = statistics.arrays()
    return mean[None], (factor / std)[None]


def latents_of(identity: Identity, shape: tuple[int, ...]) -> LatentsIdentity:
    """The identity, checked against the shape of moments. Raises UserError."""
    if not isinstance(identity, LatentsIdentity):
        raise UserError(
            f"moments are of an autoencoder, and the identity is {type(identity).__name__}; pass that of a group "
            "latents/NAME"
        )
    wanted = identity.row_shapes().get("moments", ())
    if tuple(shape[1:]) != wanted:
        raise UserError(
            f"moments of {identity.name} are (B, {', '.join(map(str, wanted))}), got {tuple(shape)}; pass a "
            "batch as it is stored"
        )
    return identity


def refused(draw: object, generator: str) -> UserError:
    """The error for what draws no noise."""
    return UserError(f'draw is a {generator}, or "mean" for no noise, got {draw!r}')
