"""The one map between latents as they are stored and as the model has them, and back.

    z = (x − shift) · scale        x = z / scale + shift        (computed in `storage/latents.py`)

`shift` and `scale` are one number, or one a channel: the mean, and the identity's factor over the deviation, of a
normalisation channel by channel. Which, `--data.latent-normalisation` says:

    auto       the latents' identity: its statistics where it has some (imports, VAEs that carry them), else its factor
               and shift
    scale      the identity's factor and shift, whatever else it says
    channel    the mean and deviation of all latents of the group, as its receipts' sums say exactly; of the draws
               mean + std · ε, over every image and view. `resolve` writes them into the run's configuration, so that
               the run keeps the map it was trained with, wherever its weights go.

All that trains, samples, decodes, exports or compares with published weights goes through here. A wrong map does not
show in the loss: the model learns, and its images are poor. So what the receipts measured is looked at before training:
a deviation that is far from 1 after the map is refused (`require_deviation`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from storage import GroupReader, UserError
from storage.base.ending import command as command_line
from storage.identity import LatentsIdentity
from storage.latents import normalised, of_statistics, spread, stored
from storage.normalisation import Normalisation, normalisation_of
from storage.statistics import latent_mean_std

if TYPE_CHECKING:
    from trainer.config.data import DataConfig

LEAST, MOST, MOST_MEAN = 0.5, 2.0, 1.0  # of a channel's deviation, and of the magnitude of its mean, after the map
LEAST_OVER_ALL = 0.25  # of all channels together: one published factor serves data sets that vary less
NAMED = 3  # channels in a message
MEASURED = "all latents of the group"


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentScale:
    """The map. Tensors are float32 (1, C, p, p): a number a channel, and for p > 1 one a pixel of a p × p patch.

    Of features as latents p is their side: a number a channel and place (`feature_latents.py`).
    """

    scale: float | Tensor
    shift: float | Tensor
    has_posterior: bool = True  # a deterministic autoencoder stores the latent itself, without a deviation
    source: str = ""  # of statistics, in words
    of_class: tuple[Tensor, Tensor] | None = None  # scale and shift (c,) of class tokens that are latents too

    @classmethod
    def of(cls, identity: LatentsIdentity, data: DataConfig | None = None) -> LatentScale:
        """Of a latents group, as a run's settings choose; without settings, as the identity says."""
        kind = data.latent_normalisation if data is not None else "auto"
        if data is not None and kind == "channel":
            statistics = _chosen(data, identity.latent_channels)
            return cls._by(statistics, 1.0, identity.has_posterior)
        of_identity = normalisation_of(identity) if kind == "auto" else None
        if of_identity is not None:
            return cls._by(of_identity, identity.latent_scale_factor, identity.has_posterior)
        return cls(
            scale=identity.latent_scale_factor,
            shift=identity.latent_shift_factor,
            has_posterior=identity.has_posterior,
        )

    @classmethod
    def _by(cls, statistics: Normalisation, factor: float, has_posterior: bool) -> LatentScale:
        shift, scale = of_statistics(statistics, factor)
        return cls(
            scale=torch.from_numpy(scale).float(),
            shift=torch.from_numpy(shift).float(),
            has_posterior=has_posterior,
            source=statistics.source,
        )

    def on(self, device: torch.device) -> LatentScale:
        """The same map with its tensors on a device, so that a step copies none."""
        if not isinstance(self.scale, Tensor) or not isinstance(self.shift, Tensor):
            return self
        of_class = None if self.of_class is None else (self.of_class[0].to(device), self.of_class[1].to(device))
        return replace(self, scale=self.scale.to(device), shift=self.shift.to(device), of_class=of_class)

    def normalised(self, x: Tensor) -> Tensor:
        """Latents as the model has them, of latents as they are stored, (B, C, h, w)."""
        return normalised(x, _spread(self.shift, x), _spread(self.scale, x))

    def normalised_class(self, c: Tensor) -> Tensor:
        """Class tokens float32 (B, c) as the model has them; as they are stored where they have no statistics (REG)."""
        if self.of_class is None:
            return c.float()
        scale, shift = (of.to(c.device) for of in self.of_class)
        return normalised(c.float(), shift, scale)

    def stored(self, z: Tensor) -> Tensor:
        """The other way round: what the autoencoder decodes."""
        return stored(z, _spread(self.shift, z), _spread(self.scale, z))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __str__(self) -> str:
        if not isinstance(self.scale, Tensor):
            return f"(x − {self.shift:g}) · {self.scale:g}"
        each = "a channel" if self.scale.shape[-1] == 1 else f"a channel and place of {self.scale.shape[-1]}²"
        return f"(x − mean) · {_range(self.scale)} {each}, by {self.source}"


def measured(latents: GroupReader[LatentsIdentity]) -> Normalisation:
    """Mean and deviation a channel of all latents of a group. Raises UserError where its receipts do not say them."""
    mean, std = _moments(latents)
    constant = np.flatnonzero(~(std > 0))
    if len(constant):
        raise UserError(
            f"{latents.path}: channel {constant[0]} is {mean[constant[0]]:g} in all latents, so it has no deviation to "
            "divide by; train with --data.latent-normalisation scale"
        )
    return Normalisation(mean=tuple(mean.tolist()), std=tuple(std.tolist()), source=MEASURED)


def require_deviation(latents: GroupReader[LatentsIdentity], scale: LatentScale, data: DataConfig) -> str:
    """Raise UserError where the deviation is far from 1 after the map; returns what there is to say of it.

    One factor for all channels is held to the deviation over all of them, statistics a channel to each channel's.
    """
    if not _has_sums(latents):
        return (
            f"whose deviation is not known and was not checked, as {_without_sums(latents)}; run "
            f"`{command_line('storage', 'statistics', 'STORE', latents.path)}` once"
        )
    mean, std = normalised_moments(latents, scale)
    over_all = float(np.sqrt(np.square(std).mean()))
    in_words = f"deviation {over_all:.3g} ({std.min():.3g} to {std.max():.3g} a channel)"
    by_channel = isinstance(scale.scale, Tensor)
    distance = np.abs(np.log(np.maximum(std, 1e-30)))
    far = (std < LEAST) | (std > MOST) | (np.abs(mean) > MOST_MEAN)
    wrong = bool(far.any()) if by_channel else not LEAST_OVER_ALL <= over_all <= MOST
    if not wrong or data.latent_deviation == "accept":
        return in_words
    worst = np.argsort(-np.maximum(distance, np.abs(mean) if by_channel else 0), kind="stable")[:NAMED]
    figures = ", ".join(f"channel {c} has mean {mean[c]:.3g} and deviation {std[c]:.3g}" for c in worst)
    rule = (
        f"each channel must have a mean within ±{MOST_MEAN:g} and a deviation of {LEAST:g} to {MOST:g}"
        if by_channel
        else f"the deviation over all channels, {over_all:.3g}, must be {LEAST_OVER_ALL:g} to {MOST:g}"
    )
    fix = (
        "no --data.latent-mean and --data.latent-std, so that they are measured, or "
        if data.latent_normalisation == "channel"
        else "--data.latent-normalisation channel, or "
    )
    raise UserError(
        f"{latents.path} is normalised by {scale}, after which {figures}; {rule}: pass {fix}--data.latent-deviation "
        "accept if it is meant"
    )


def normalised_moments(latents: GroupReader[LatentsIdentity], scale: LatentScale) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation a channel, float64 (C,), of the group's latents after the map.

    Statistics of patches are compared with sums of whole channels, as if each pixel of a patch had the channel's.
    """
    mean, std = _moments(latents)
    k, m = (
        of.double().numpy(force=True).reshape(len(mean), -1) if isinstance(of, Tensor) else np.full((len(mean), 1), of)
        for of in (scale.scale, scale.shift)
    )
    first = ((mean[:, None] - m) * k).mean(1)
    second = ((np.square(std)[:, None] + np.square(mean[:, None] - m)) * np.square(k)).mean(1)
    return first, np.sqrt(np.maximum(second - np.square(first), 0))


def _moments(latents: GroupReader[LatentsIdentity]) -> tuple[np.ndarray, np.ndarray]:
    """As stored, of the draws mean + std · ε."""
    if not _has_sums(latents):
        raise UserError(
            f"{_without_sums(latents)}, by which channels are normalised; run `python -m storage statistics STORE "
            f"{latents.path}` once"
        )
    sums, _ = latents.sums
    return latent_mean_std(sums["moments"], latents.identity.latent_channels)


def _without_sums(latents: GroupReader[LatentsIdentity]) -> str:
    _, without = latents.sums
    return f"{without} of {latents.layout.store.n_units} receipts of {latents.path} have no sums of their latents"


def _has_sums(latents: GroupReader[LatentsIdentity]) -> bool:
    sums, without = latents.sums
    return not without and "moments" in sums


def _chosen(data: DataConfig, channels: int) -> Normalisation:
    """What a run's configuration has of statistics; `resolve` wrote them, or the user did."""
    mean, std = data.latent_mean, data.latent_std
    if len(mean) != channels:
        raise UserError(
            f"--data.latent-mean and --data.latent-std have {len(mean)} numbers, and the latents {channels} channels; "
            "give one a channel, or leave both empty to measure them"
        )
    return Normalisation(mean=mean, std=std, source="--data.latent-mean and --data.latent-std")


def _spread(of: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or numbers of channels laid over latents (B, C, h, w), where these are."""
    of_all: float | Tensor = spread(of.to(like.device) if isinstance(of, Tensor) else of, like)
    return of_all


def _range(values: Tensor) -> str:
    return f"[{values.min():.4g} … {values.max():.4g}]"
