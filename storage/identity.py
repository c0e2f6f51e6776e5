"""Identity: everything that determines a group's numbers, and a digest of it that decides reuse.

Two runs with equal identities write equal arrays, so work is skipped exactly when digests agree. What may change
without changing a number (paths, host names, times, batch size) is provenance and stays out. The digest is SHA-256 over
canonical JSON: sorted keys, no spaces, UTF-8, no NaN.

    LatentsIdentity     of a group latents/NAME
    FeaturesIdentity    of a group features/NAME
    VectorsIdentity     of a feature file

`plain` is the one writer: the mapping that is stored and hashed. `parse` is the one parser of such a mapping, and
`plain` of what it gives is that mapping to the byte: a field that is absent stays absent, and what has no name here (of
a user's own encoder, of an older or a later version) goes through `others`. A value is checked where code computes with
it. An identity has no version: its group has one, its codec a name, and an unknown one of either is refused by whoever
opens the group (`Store.group_layout`) or decodes its arrays (`storage.codecs.codec_of`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, FiniteFloat, SkipValidation, WrapValidator

from storage.base.boundary import parse_json
from storage.base.errors import StoreError
from storage.base.shown import shown
from storage.schema import Count, Size


def _as_written(value: Any, check: Callable[[Any], object]) -> Any:
    check(value)
    return value


Kept = Annotated[str, SkipValidation]  # compared and shown only, so that any JSON will do
Exact = WrapValidator(_as_written)  # 1 and 1.0 are equal numbers and other bytes
ABSENT: Any = None  # numbers that a group of others may lack; `GroupReader.require` comes before they are computed with


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What every kind says, in the order in which it is stored."""

    kind: Kept | None = None  # whoever reads goes by the group's path
    name: str | None = None
    crop: Kept | None = None
    resolution: Count | None = None
    dtype: str | None = None
    arithmetic: Kept | None = None
    codec: dict[str, Any] | None = None  # `storage.codecs.codec_of`
    encoder: str | None = None
    weights_sha256: str | None = None
    published_weights: Annotated[bool, SkipValidation] | None = None  # of Inception: whether they define FID
    source_sha256: Kept | None = None  # of numbers that were imported
    preprocessing: Kept | None = None
    views: tuple[str, ...] | None = None
    index_digest: Kept | None = None
    others: Mapping[str, Any] = field(default_factory=dict)  # what is stored under other names, and nulls
    order: tuple[str, ...] = field(default=(), compare=False)  # names as they are stored; the others follow

    def plain(self) -> dict[str, Any]:
        """The mapping that is stored and hashed."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("others", "order")}
        stored = {name: list(v) if isinstance(v, tuple) else v for name, v in own.items() if v is not None}
        stored |= {name: v for name, v in self.others.items() if name not in stored}  # a null that was replaced is gone
        return {name: stored[name] for name in dict.fromkeys((*self.order, *stored)) if name in stored}

    @property
    def digest(self) -> str:
        """What decides reuse."""
        return identity_digest(self.plain())

    def of_samples(self, views: Iterable[str], index_digest: str) -> Self:
        """The identity of a group of these samples; views and index are named last."""
        encoder = replace(self, views=None, index_digest=None)
        return replace(encoder, views=tuple(views), index_digest=index_digest, order=tuple(encoder.plain()))

    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Array name → shape of one sample of one view, of the arrays that a group may have, where they are known."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LatentsIdentity(Identity):
    """Of latents: z = (x − shift) · scale has `latent_channels` of `latent_size`, (h, w).

    With a `latent_normalisation`, z = (x − mean) / std · scale, channel by channel (`storage.normalisation`).
    """

    stored: Kept | None = None
    posterior: bool | None = None  # false: the latent itself is stored, not the mean and deviation that it is drawn by
    latent_channels: Size = ABSENT
    latent_size: tuple[Size, Size] = ABSENT
    latent_scale_factor: Annotated[FiniteFloat, Field(gt=0), Exact] = ABSENT
    latent_shift_factor: Annotated[FiniteFloat, Exact] = ABSENT
    latent_normalisation: dict[str, Any] | None = None  # `storage.normalisation.normalisation_of`

    @property
    def has_posterior(self) -> bool:
        """Whether mean and deviation are stored."""
        return self.posterior is not False

    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """As of every identity."""
        if not self.latent_channels or not self.latent_size:
            return {}
        return {"moments": (self.latent_channels * (2 if self.has_posterior else 1), *self.latent_size)}


@dataclass(frozen=True, kw_only=True)
class FeaturesIdentity(Identity):
    """Of features: patch tokens of `width` channels on a grid of (rows, columns), or the class token, or both."""

    layer: Kept | None = None
    tokens: Kept | None = None  # patch, cls or both
    token_grid: tuple[Size, Size] = ABSENT
    width: Size = ABSENT
    derived_from: dict[str, Any] | None = None  # of numbers that were another group's, not an encoder's: `derive`

    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """As of every identity; `patches` is (T, D), and how a codec lays it out is the codec's matter."""
        if not self.width:
            return {}
        grid = {"patches": (math.prod(self.token_grid), self.width)} if self.token_grid else {}
        return {"cls": (self.width,), **grid}


@dataclass(frozen=True, kw_only=True)
class VectorsIdentity(FeaturesIdentity):
    """Of a feature file: which vector of the encoder it has, cls, mean, or Inception's pool_3."""

    name: str = field()
    vector: str


AnyIdentity = TypeVar("AnyIdentity", bound=Identity)
OF_GROUPS: Mapping[str, type[Identity]] = {"latents": LatentsIdentity, "features": FeaturesIdentity}


def parse(kind: type[AnyIdentity], stored: Mapping[str, Any], where: str, fix: str) -> AnyIdentity:
    """The identity that somebody has stored. Raises StoreError naming the first field that is not as it should be."""
    names = {each.name for each in fields(kind)} - {"others", "order"}
    named = {name: value for name, value in stored.items() if name in names and value is not None}
    others = {name: value for name, value in stored.items() if name not in named}
    return replace(parse_json(kind, json.dumps(named), where, fix), others=others, order=tuple(stored))


def canonical_json(value: Any) -> str:
    """JSON in the one spelling that is hashed; raises ValueError for NaN and TypeError for what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity_digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of an identity as it is stored."""
    return hashlib.sha256(canonical_json(dict(plain)).encode()).hexdigest()


def unlike(a: Identity, b: Identity, names: Iterable[str] | None = None) -> str:
    """In what two identities differ, "field: A's and B's; …" for a message, or "" where they agree."""
    one, other = a.plain(), b.plain()
    asked = sorted({*one, *other}) if names is None else names
    return "; ".join(
        f"{shown(name)}: {_cut(shown(str(one.get(name))))} and {_cut(shown(str(other.get(name))))}"
        for name in asked
        if one.get(name) != other.get(name)
    )


def differing_fields(
    wanted: Mapping[str, Any],
    stored: Mapping[str, Any],
    verbs: tuple[str, str] = ("found", "asked for"),
    prefix: str = "",
) -> list[str]:
    """One "field: found X, asked for Y" a leaf that differs, in key order; nested mappings are dotted."""
    lines = []
    for key in sorted({*wanted, *stored}):
        a, b = wanted.get(key), stored.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, verbs, f"{prefix}{key}.")
        elif canonical_json(a) != canonical_json(b):
            lines.append(f"{prefix}{key}: {verbs[0]} {_short(b)}, {verbs[1]} {_short(a)}")
    return lines


def require_same(wanted: Mapping[str, Any], stored: Mapping[str, Any], what: str, fix: str) -> None:
    """Raise StoreError naming every field in which `stored` differs from `wanted`; `fix` ends the sentence."""
    lines = differing_fields(wanted, stored)
    if lines:
        raise StoreError(f"{what} was made differently ({'; '.join(lines)}); {fix}")


def _short(value: Any) -> str:
    text = "nothing" if value is None else canonical_json(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}…{text[-58:]}"
