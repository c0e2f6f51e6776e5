"""Mean and deviation of what a group holds, from sums that each unit's receipt carries.

A unit records count, sum and sum of squares of every channel of its arrays, and of the norms of its tokens, in float64.
Sums merge by adding, so it does not matter which run wrote which unit, a unit that is encoded again replaces its own
share, and nothing has to be written when the last unit is done: whoever asks adds up the receipts. Units are added
exactly and rounded once, in whatever order. They are not in the group's attributes, which are sealed before the
first unit and never change.

Numbers are those that are stored, decoded where they are in a codec. Cost: `python -m benchmarks.precompute` has it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from storage.base.errors import StoreError
from storage.codecs import TOKENS, Codec, codec_of, decoded
from storage.identity import Identity, LatentsIdentity
from storage.layout import GroupLayout
from storage.receipts import HEAL_RECEIPT, Receipt, scan
from storage.roots import Root
from storage.schema import PackedSums

NORM = ".norm"  # `patches.norm`: the Euclidean norms of the tokens of `patches`


@dataclass(frozen=True)
class Sums:
    """How many vectors (C,) were seen, and per channel the sum of their values and of the squares."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """Per channel, float64 (C,)."""
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        """Standard deviation per channel (of the population), float64 (C,)."""
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))

    def packed(self) -> PackedSums:
        """As a receipt holds it: base64 of little-endian float64."""
        return {
            "count": self.count,
            "sum": base64.b64encode(self.total.astype("<f8").tobytes()).decode(),
            "sum_squares": base64.b64encode(self.squares.astype("<f8").tobytes()).decode(),
        }

    @staticmethod
    def unpacked(fields: PackedSums) -> Sums:
        """From what a receipt holds. Raises ValueError when it is no array of numbers."""
        total, squares = (
            np.frombuffer(base64.b64decode(text), "<f8") for text in (fields["sum"], fields["sum_squares"])
        )
        return Sums(fields["count"], total, squares)


@np.errstate(invalid="ignore")  # infinity less infinity
def unit_sums(
    layout: GroupLayout, arrays: Mapping[str, np.ndarray], present: np.ndarray, codec: Codec, first_row: int
) -> dict[str, Sums]:
    """Sums of a unit's arrays (n, V, *row_shape), over the rows in `present` (positions); it begins at `first_row`.

    Channels are a latent's first axis and a token's last; token arrays have their norms besides. A number that is not
    finite leaves its channel's sum so.
    """
    latents = layout.path.startswith("latents/")
    sums: dict[str, Sums] = {}
    names, views = [array.name for array in layout.arrays], np.arange(layout.store.n_views)
    for i in present.tolist():
        stored = {name: arrays[name][i] for name in names}
        for name, row in decoded(codec, stored, np.full_like(views, first_row + i), views, dtype=np.float32).items():
            if latents:
                row = np.moveaxis(row, 1, -1)
            vectors = row.reshape(-1, row.shape[-1]).astype(np.float64)
            squares = np.square(vectors)
            _add(sums, name, Sums(len(vectors), vectors.sum(0), squares.sum(0)))
            if not latents:
                norms_squared = squares.sum(1)
                norms = np.sqrt(norms_squared)
                _add(sums, name + NORM, Sums(len(norms), norms.sum(keepdims=True), norms_squared.sum(keepdims=True)))
    return sums


def group_sums(
    root: Root, layout: GroupLayout, digest: str, identity: Identity | None = None
) -> tuple[dict[str, Sums], int]:
    """(sums over the group's done units, how many done units have none: a store that was imported long ago, say)."""
    done = (receipt for _, receipt, reason in scan(root, layout, digest) if receipt is not None and reason is None)
    return add_up(layout, done, identity)


def add_up(
    layout: GroupLayout, receipts: Iterable[Receipt], identity: Identity | None = None
) -> tuple[dict[str, Sums], int]:
    """(sums over the units of these receipts, how many of those that have rows have none)."""
    parts: dict[str, list[Sums]] = {}
    without = 0
    for receipt in receipts:
        without += not receipt.statistics and receipt.n_done > 0
        for name, new in receipt_sums(layout, receipt, identity).items():
            parts.setdefault(name, []).append(new)
    return {name: merged(of) for name, of in parts.items()}, without


def merged(parts: Sequence[Sums]) -> Sums:
    """The sum of sums, exact but for one rounding a channel; NaN and infinity go through."""

    def total(columns: np.ndarray) -> np.ndarray:
        if not np.isfinite(columns).all():
            with np.errstate(invalid="ignore"):
                return np.asarray(columns.sum(0))
        return np.array([math.fsum(column) for column in columns.T.tolist()])

    return Sums(
        sum(part.count for part in parts),
        total(np.stack([part.total for part in parts])),
        total(np.stack([part.squares for part in parts])),
    )


def receipt_sums(layout: GroupLayout, receipt: Receipt, identity: Identity | None = None) -> dict[str, Sums]:
    """The sums that a unit's receipt carries. Raises StoreError when they are not of the group's arrays.

    The group's identity says how many channels tokens have that lie in a codec's arrays.
    """
    shapes = {array.name: array.row_shape for array in layout.arrays} | (identity.row_shapes() if identity else {})
    channels = {name: shape[0 if layout.path.startswith("latents/") else -1] for name, shape in shapes.items()}
    channels |= {name + NORM: 1 for name in channels}
    sums = {}
    for name, fields in receipt.statistics.items():
        try:
            unpacked = Sums.unpacked(fields)
            if (len(unpacked.total), len(unpacked.squares)) != (channels[name],) * 2:
                raise ValueError(
                    f"{len(unpacked.total)} and {len(unpacked.squares)} numbers for {channels[name]} channels"
                )
        except (KeyError, ValueError) as error:
            raise StoreError(
                f"{layout.path}: the statistics of {name} in the receipt of unit {receipt.unit} are damaged ({error}); "
                f"{HEAL_RECEIPT}"
            ) from None
        sums[name] = unpacked
    return sums


def latent_mean_std(moments: Sums, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation of z = mean + std · ε, float64 (C,); of z itself without a posterior.

    Var z = Var mean + E std², by the law of total variance, so no ε has to be drawn.
    """
    variance = moments.std[:channels] ** 2
    if len(moments.total) == 2 * channels:
        variance = variance + moments.squares[channels:] / moments.count
    return moments.mean[:channels], np.sqrt(variance)


def describe(sums: Mapping[str, Sums], identity: Identity) -> list[str]:
    """The statistics in a few lines; of codes that are right on average only, deviations and norms say so."""
    lines = []
    error = ", with the codes' error" if not _exact(identity) else ""
    for name, of in sums.items():
        of_codes = error if name.removesuffix(NORM) == TOKENS else ""
        if name.endswith(NORM):
            lines.append(f"{name.removesuffix(NORM)} norm of a token {of.mean[0]:.4g} ± {of.std[0]:.4g}{of_codes}")
        elif name == "moments" and isinstance(identity, LatentsIdentity) and identity.latent_channels:
            mean, std = latent_mean_std(of, identity.latent_channels)
            lines += [f"latent mean a channel  {_listed(mean)}", f"latent std a channel   {_listed(std)}"]
        else:
            low, high = (f"from {x.min():.4g} to {x.max():.4g}" for x in (of.mean, of.std))
            lines.append(f"{name} over {len(of.mean)} dimensions: mean {low}, std {high}{of_codes}")
    return lines


def _exact(identity: Identity) -> bool:
    """Whether tokens stand for themselves; those of an unknown codec cannot be decoded and have no sums to speak of."""
    try:
        return codec_of(identity).exact
    except StoreError:
        return True


def _add(sums: dict[str, Sums], name: str, new: Sums) -> None:
    sums[name] = sums[name] + new if name in sums else new


def _listed(values: np.ndarray) -> str:
    return " ".join(f"{value:.4f}" for value in values)
