"""An encoder's features as latents (RAE, arXiv 2510.11690): tokens on their grid, normalised by channel and place.

    n = (f − bias) / weight                 the final norm without its affine part, where the group says what that was
    x = (n − mean) / √(var + 1e-5)          mean and var (D, h, w) of all tokens of a place; class tokens by their own

f is what is stored. Statistics are counted (`storage/places.py`) or those of a published file, which are of n. Both
lines are one map of f (`LatentScale`), so what a model draws goes back to f, and to n for a decoder (`without_affine`).

Codes lose a little, and so does float16 where a channel hardly varies beside its mean. An error of deviation ε in x is
as large as the noise from the noise level t = ε / (1 + ε) down: below it a model learns the codes, not the features.
MOST_LEVEL is where RiT stops telling noise levels apart; what is stored with a larger error is refused, and so is what
spoils a single channel (MOST_OF_CHANNEL). Measured on tokens of real photographs: `python -m benchmarks.feature_codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage import GroupReader, Store, UserError, places
from storage.codecs import TOKENS
from storage.codecs.codec import rounding_variance
from storage.final_norm import AFFINE, FinalNorm, final_norm_of
from storage.identity import FeaturesIdentity, LatentsIdentity
from storage.order import ValidRows
from storage.places import PlaceStatistics
from trainer.data.latent_scale import LatentScale

EPSILON = 1e-5  # added to a variance
MOST_LEVEL = 0.05
MOST_OF_CHANNEL = 0.25  # deviation of the codes' error, where the channel's own is 1
LOOKED_AT, ENOUGH = 64, 32  # rows, evenly spread; of which a class token's moments can be judged
TOLD = 1e-3  # deviation of the error of what is stored, from which on it is told
LEAST, MOST, MOST_MEAN = 0.5, 2.0, 1.0  # of the deviation and the mean of any channel after the map
OF_FEATURES = "features/"
CLASS_TOKEN = "cls"
NO_NORM = "none"


def latents_identity(features: FeaturesIdentity) -> LatentsIdentity:
    """What tokens on their grid are as latents: D channels of (rows, columns), without a posterior."""
    return LatentsIdentity(
        name=features.name,
        encoder=features.encoder,
        posterior=False,
        latent_channels=features.width,
        latent_size=features.token_grid,
        latent_scale_factor=1.0,
        latent_shift_factor=0.0,
    )


def on_grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, T, D), row-major, as latents (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def require_features(group: GroupReader[FeaturesIdentity], *, class_token: bool) -> None:
    """Raise UserError or StoreError where a group cannot be latents: no patch tokens, or no class tokens."""
    group.require("token_grid", "width", arrays=[TOKENS])
    if class_token and CLASS_TOKEN not in group.arrays:
        raise UserError(
            f"{group.path} holds no class tokens, which --model.class-token needs; precompute the features with "
            "tokens=both (--features ENCODER:tokens=both), or pass --model.class-token false"
        )
    group.codec  # noqa: B018 - is known, or says so


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """Weight and bias, float64 (D,), of what was stored."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, norm: FinalNorm | None, width: int) -> _Affine:
        if norm is None:
            return cls(weight=np.ones(width), bias=np.zeros(width))
        return cls(weight=norm.weight.astype(np.float64), bias=norm.bias.astype(np.float64))


def scale_of(group: GroupReader[FeaturesIdentity], statistics: PlaceStatistics, *, source: str) -> LatentScale:
    """The map of a group's tokens, by statistics of n. Raises UserError or StoreError for a norm that says too little.

    `source` says in words where the statistics are from.
    """
    affine = _affine(group)
    weight, bias = (of[:, None, None] for of in (affine.weight, affine.bias))
    scale = 1 / (weight * np.sqrt(statistics.var + EPSILON))
    shift = weight * statistics.mean + bias
    of_class: tuple[Tensor, Tensor] | None = None
    if statistics.mean_class is not None and statistics.var_class is not None:
        of_class = (
            torch.from_numpy(1 / (affine.weight * np.sqrt(statistics.var_class + EPSILON))).float(),
            torch.from_numpy(affine.weight * statistics.mean_class + affine.bias).float(),
        )
    return LatentScale(
        scale=torch.from_numpy(scale)[None].float(),
        shift=torch.from_numpy(shift)[None].float(),
        has_posterior=False,
        source=source,
        of_class=of_class,
    )


def statistics_of(
    store: Store, group: GroupReader[FeaturesIdentity], file: Path, *, class_token: bool
) -> tuple[PlaceStatistics, str]:
    """Statistics of n, and where they are from: those of a published file, or those that the store counted.

    Raises UserError where there are none, or none of class tokens.
    """
    if file != Path():
        from storage.weights.latent_statistics import read_place_statistics

        if group.identity.layer == AFFINE and _final_norm(group) is None:
            raise UserError(
                f"{group.path} has the affine part of its final norm and does not say what that is, and {file} is of "
                "tokens without; precompute with --features ENCODER:norm=plain, or leave --data.latent-statistics out"
            )
        statistics, source = read_place_statistics(file, places.shape_of(group)), str(file)
    else:
        counted = places.read(store.root, group)
        if counted is None:
            raise UserError(
                f"{group.path} has no statistics of its places, by which latents are normalised; run "
                f"`{places.command(store.root, group.path)}` once, or pass --data.latent-statistics FILE"
            )
        statistics, source = _of_plain(counted, _affine(group)), "all tokens of the group"
    if class_token and statistics.mean_class is None:
        raise UserError(
            f"the statistics of {group.path} ({source}) have no class tokens, which --model.class-token needs; take a "
            "file that has mean_cls_token and var_cls_token, or pass --model.class-token false"
        )
    return statistics, source


def norm_digest(group: GroupReader[FeaturesIdentity]) -> str:
    """Which affine part of the final norm is undone in a group's map, SHA-256 (hex); "none" of none."""
    norm = _final_norm(group)
    return NO_NORM if norm is None else norm.digest


def without_affine(tokens: Tensor, group: GroupReader[FeaturesIdentity]) -> Tensor:
    """n of f (B, D, h, w), which decoders of features take. Raises UserError where the group does not say it."""
    norm = _final_norm(group)
    if norm is None:
        if group.identity.layer == AFFINE:
            raise UserError(
                f"{group.path} has the affine part of its final norm and does not say what that is, and a decoder "
                "takes tokens without; precompute with --features ENCODER:norm=plain, and train on that"
            )
        return tokens
    weight, bias = (
        torch.tensor(of, dtype=tokens.dtype, device=tokens.device)[:, None, None] for of in (norm.weight, norm.bias)
    )
    return (tokens - bias) / weight


def read_latents(group: GroupReader[Any], rows: np.ndarray) -> Tensor:
    """Rows of a latents group as they are stored, or of a features group on their grid, float; the first view."""
    if not group.path.startswith(OF_FEATURES):
        return torch.from_numpy(group.gather(rows, 0, ["moments"])["moments"])
    return on_grid(torch.from_numpy(group.tokens(rows)), group.identity.token_grid)


def require_normal(
    group: GroupReader[FeaturesIdentity], valid_rows: ValidRows, scale: LatentScale, *, accept: bool
) -> str:
    """Look at rows that are evenly spread: raise UserError where channels are far from mean 0 and deviation 1, or where
    the error of what is stored would be felt; returns what there is to say of both. With `accept` nothing is refused.

    Class tokens are looked at where they are latents too, and there are at least ENOUGH rows.
    """
    rows = valid_rows.rows(np.unique(np.linspace(0, len(valid_rows) - 1, LOOKED_AT).astype(np.int64)))
    tokens = _tokens_looked_at(group, rows, scale)
    in_words = f"deviation {_rms(tokens.std):.3g} ({tokens.std.min():.3g} to {tokens.std.max():.3g} a channel)"
    if _rms(tokens.error) >= TOLD:
        in_words += (
            f", of which {_stored_as(group)} are {_rms(tokens.error):.2g} ({tokens.error.max():.2g} in the worst "
            f"channel): noise up to level {_level(tokens.error):.2g}"
        )
    if accept:
        return in_words
    looked_at = {group.path: tokens}
    if scale.of_class is not None and len(rows) >= ENOUGH:
        looked_at[f"the class token of {group.path}"] = _class_tokens_looked_at(group, rows, scale)
    for what, each in looked_at.items():
        _require_small_error(what, each)
        _require_mean_and_deviation(what, each, scale)
    return in_words


@dataclass(frozen=True, kw_only=True)
class _LookedAt:
    """Of x, by channel, float64 (D,): mean, deviation, and the deviation of the error of what is stored.

    The error is of a deviation of 1 where that is larger, so that statistics of other tokens do not pass for an error.
    """

    mean: np.ndarray
    std: np.ndarray
    error: np.ndarray
    stored_as: str  # in words, and what may be stored instead
    instead: str


def _looked_at(x: Tensor, error_variance: Tensor, over: tuple[int, ...], *, stored_as: str, instead: str) -> _LookedAt:
    std = x.double().std(over, correction=0).numpy()
    error = error_variance.double().mean(over).sqrt().numpy() / np.maximum(std, 1)
    mean = x.double().mean(over).numpy()
    return _LookedAt(mean=mean, std=std, error=error, stored_as=stored_as, instead=instead)


def _tokens_looked_at(group: GroupReader[FeaturesIdentity], rows: np.ndarray, scale: LatentScale) -> _LookedAt:
    stored, size = group.gather(rows, 0, group.codec_arrays), group.identity.token_grid
    shape = (len(rows), size[0] * size[1], group.identity.width)
    error = on_grid(torch.from_numpy(np.broadcast_to(group.codec.error_variance(stored), shape).copy()), size)
    factors = torch.as_tensor(scale.scale).double().square()
    if group.codec.identity is None:
        instead = _instead_of_float16(group)
    else:
        instead = "store float16" if group.codec.exact else "store float16 or int8 (rotated codes are for alignment)"
    x = scale.normalised(read_latents(group, rows))
    return _looked_at(x, error * factors, (0, 2, 3), stored_as=_stored_as(group), instead=instead)


def _class_tokens_looked_at(group: GroupReader[FeaturesIdentity], rows: np.ndarray, scale: LatentScale) -> _LookedAt:
    assert scale.of_class is not None
    stored = group.gather(rows, 0, [CLASS_TOKEN])[CLASS_TOKEN]
    error = torch.from_numpy(rounding_variance(stored)) * scale.of_class[0].double().square()
    x, stored_as = scale.normalised_class(torch.from_numpy(stored)), f"{stored.dtype} numbers"
    return _looked_at(x, error, (0,), stored_as=stored_as, instead=_instead_of_float16(group))


def _instead_of_float16(group: GroupReader[FeaturesIdentity]) -> str:
    if group.identity.layer == AFFINE:
        return "precompute with --features ENCODER:norm=plain, whose numbers float16 holds"
    return "take features of another layer or encoder"


def _require_small_error(what: str, tokens: _LookedAt) -> None:
    if not (_level(tokens.error) > MOST_LEVEL or tokens.error.max() > MOST_OF_CHANNEL):
        return
    raise UserError(
        f"{what} is in {tokens.stored_as}, whose error in normalised tokens is {_rms(tokens.error):.2g}, as much as "
        f"the noise at level {_level(tokens.error):.2g}, and {tokens.error.max():.2g} in channel "
        f"{int(tokens.error.argmax())}; at most level {MOST_LEVEL:g}, and {MOST_OF_CHANNEL:g} in a channel, is not "
        f"felt: {tokens.instead}, or pass --data.latent-deviation accept if it is meant"
    )


def _require_mean_and_deviation(what: str, tokens: _LookedAt, scale: LatentScale) -> None:
    near = (tokens.std >= LEAST) & (tokens.std <= MOST) & (np.abs(tokens.mean) <= MOST_MEAN)  # NaN is not
    if near.all():
        return
    distance = np.abs(np.log(np.maximum(tokens.std, 1e-30))) + np.abs(tokens.mean)
    worst = int(np.argmax(np.where(near, -1, distance)))
    raise UserError(
        f"{what} is normalised by {scale.source}, after which channel {worst} has mean {tokens.mean[worst]:.3g} and "
        f"deviation {tokens.std[worst]:.3g}; each must have a mean within ±{MOST_MEAN:g} and a deviation of {LEAST:g} "
        f"to {MOST:g}: use the statistics of these features, or pass --data.latent-deviation accept if it is meant"
    )


def _stored_as(group: GroupReader[FeaturesIdentity]) -> str:
    return f"{group.codec.spelling} {'numbers' if group.codec.identity is None else 'codes'}"


def _level(error: np.ndarray) -> float:
    """The noise level as large as an error whose deviations by channel are `error`."""
    return _rms(error) / (1 + _rms(error))


def _rms(of_channels: np.ndarray) -> float:
    return float(np.sqrt(np.square(of_channels).mean()))


def _of_plain(counted: PlaceStatistics, affine: _Affine) -> PlaceStatistics:
    """Statistics of n, of those of f = weight · n + bias."""
    weight, bias = (of[:, None, None] for of in (affine.weight, affine.bias))
    of_class: dict[str, Any] = {}
    if counted.mean_class is not None and counted.var_class is not None:
        of_class = {
            "mean_class": (counted.mean_class - affine.bias) / affine.weight,
            "var_class": counted.var_class / np.square(affine.weight),
        }
    return PlaceStatistics(mean=(counted.mean - bias) / weight, var=counted.var / np.square(weight), **of_class)


def _final_norm(group: GroupReader[FeaturesIdentity]) -> FinalNorm | None:
    """Of a group whose tokens have it."""
    if group.identity.layer != AFFINE:
        return None
    return final_norm_of(group.attributes, group.identity, group.path)


def _affine(group: GroupReader[FeaturesIdentity]) -> _Affine:
    affine = _Affine.of(_final_norm(group), group.identity.width)
    without = np.flatnonzero(affine.weight == 0)
    if len(without):
        raise UserError(
            f"the final norm of {group.path} has weight 0 in channel {without[0]}, so its tokens do not say what was "
            "there; precompute with --features ENCODER:norm=plain"
        )
    return affine
