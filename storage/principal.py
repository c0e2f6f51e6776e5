"""Principal components of a group's patch tokens: the basis that `derive --pca` projects with, and how it is fitted.

Shape legend: D channels of a token y, K components. With the mean μ and the deviation σ of each channel (σ = 1 unless
standardised) over the sample, and C (K, D) the leading eigenvectors of the covariance of (y − μ)/σ,

    z = C ((y − μ)/σ)          y ≈ μ + σ ⊙ (Cᵀ z)

(Pearson, "On lines and planes of closest fit", 1901). ReDi (arXiv 2504.16064) diffuses such z, standardised, beside
latents. An eigenvalue is the variance of its component, with n − 1 for n tokens; σ has n. Of ±c, that one is taken
whose largest entry by magnitude, the first of several, is positive.

The sample is a keyed choice of rows, all views and tokens of each. Sums are float64, of tokens less the first row's
mean so that a mean far from zero costs no digits, made in blocks of rows and added in order: the basis is the same
whatever the number of processes. It is a group's attribute `basis`, and its digest is in the group's identity.

Cost of fitting: the sample's rows read, 2·D² operations a token, D² numbers in memory a process.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from storage.base.console import progress_bar
from storage.base.errors import StoreError, UserError
from storage.base.waiting import waiting
from storage.codecs import TOKENS
from storage.identity import FeaturesIdentity
from storage.metadata import RESTORE, typed_attributes
from storage.order import Order, ValidRows
from storage.processes import in_processes
from storage.reader import GroupReader
from storage.schema import PackedBasis

BASIS = "basis"  # the attribute
BLOCK_ROWS = 16
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which components are wanted: all that, with the tokens, determines a basis."""

    components: int
    sample_rows: int
    seed: int
    standardised: bool


@dataclass(frozen=True, kw_only=True)
class Basis:
    """All float64; `components` has orthonormal rows, by eigenvalues from the largest."""

    mean: np.ndarray  # (D,)
    deviation: np.ndarray  # (D,)
    components: np.ndarray  # (K, D)
    eigenvalues: np.ndarray  # (K,)
    total_variance: np.ndarray  # (1,), the sum of all D eigenvalues

    def project(self, tokens: np.ndarray) -> np.ndarray:
        """Float32 (…, K) of tokens (…, D).

        Raises UserError naming the first token that holds NaN or infinity, or whose components float16 cannot carry.
        """
        _require_finite(tokens)
        projected = ((tokens - self.mean) / self.deviation) @ self.components.T
        beyond = (np.abs(projected) > LARGEST).any(-1)
        if beyond.any():
            which = tuple(np.argwhere(beyond)[0].tolist())
            raise UserError(f"token {which} has a component beyond float16's {LARGEST:g}; standardise the channels")
        return projected.astype(np.float32)

    def restore(self, projected: np.ndarray) -> np.ndarray:
        """The nearest tokens, float64 (…, D), of components (…, K)."""
        return self.mean + self.deviation * (projected @ self.components)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all arrays, little-endian, in the order of declaration."""
        return hashlib.sha256(b"".join(_bytes(getattr(self, each.name)) for each in fields(self))).hexdigest()

    def packed(self) -> PackedBasis:
        """As the attribute holds it: base64 of little-endian float64, row by row."""
        arrays = {each.name: base64.b64encode(_bytes(getattr(self, each.name))).decode() for each in fields(self)}
        return PackedBasis(**arrays)  # type: ignore[typeddict-item]

    @staticmethod
    def unpacked(packed: PackedBasis) -> Basis:
        """From what the attribute holds. Raises ValueError for what is no basis."""
        arrays = {name: np.frombuffer(base64.b64decode(str(text)), "<f8") for name, text in packed.items()}
        shape = (len(arrays["eigenvalues"]), len(arrays["mean"]))
        arrays["components"] = arrays["components"].reshape(shape)
        if not len(arrays["mean"]) == len(arrays["deviation"]) or len(arrays["total_variance"]) != 1:
            raise ValueError(f"{len(arrays['deviation'])} deviations of {len(arrays['mean'])} channels")
        return Basis(**arrays)


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def basis_of(group: GroupReader[FeaturesIdentity]) -> Basis:
    """The basis that a group's tokens were projected with. Raises StoreError for a group without, or a damaged one."""
    wanted = (group.identity.derived_from or {}).get("pca", {}).get("basis_sha256")
    basis = stored_basis(group.attributes, group.path)
    if basis is None:
        raise StoreError(
            f"{group.path} does not hold principal components; `python -m storage derive --pca` makes some"
        )
    if basis.digest != wanted:
        raise StoreError(f"{group.path}: its basis is not the one that its identity names; {RESTORE}")
    return basis


def stored_basis(attributes: Mapping[str, Any], where: str) -> Basis | None:
    """The basis among a group's attributes, if there is one. Raises StoreError when it is damaged."""
    if BASIS not in attributes:
        return None
    try:
        return Basis.unpacked(typed_attributes(PackedBasis, attributes[BASIS], f"{where}: the basis"))
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{where}: the basis is damaged ({error}); {RESTORE}") from None


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Of n tokens less a shift: their sum (D,) and the sum of their outer products (D, D), float64."""

    n: int
    total: np.ndarray
    products: np.ndarray

    @staticmethod
    def of(tokens: np.ndarray, shift: np.ndarray) -> Sums:
        """Of tokens (n, D)."""
        centred = tokens.astype(np.float64) - shift
        return Sums(n=len(centred), total=centred.sum(0), products=centred.T @ centred)

    def __add__(self, other: Sums) -> Sums:
        return Sums(n=self.n + other.n, total=self.total + other.total, products=self.products + other.products)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a worker needs to read the sample; it pickles."""

    parent: GroupReader[FeaturesIdentity]
    rows: np.ndarray  # int64, ascending
    shift: np.ndarray  # float64 (D,)

    def tokens(self, row: int) -> np.ndarray:
        """Float32 (V·T, D). Raises UserError naming the row that holds NaN or infinity."""
        views = np.arange(self.parent.layout.store.n_views)
        tokens = self.parent.tokens(np.full_like(views, row), views)
        try:
            _require_finite(tokens)
        except UserError as error:
            raise UserError(f"{self.parent.path}, row {row}, (view, token) in brackets: {error}") from None
        return tokens.reshape(-1, tokens.shape[-1])


def fitted(parent: GroupReader[FeaturesIdentity], wanted: Request, n_workers: int) -> Basis:
    """The basis of the parent's tokens. Raises UserError for more components than channels, or a token with NaN."""
    width = parent.shapes(decoded=True)[TOKENS].row_shape[-1]
    if wanted.components > width:
        raise UserError(f"--pca {wanted.components} is more than the {width} channels of {parent.path}; ask for fewer")
    valid = ValidRows(parent.layout.store.n_rows, parent.failed_rows)
    if not len(valid):
        raise UserError(f"{parent.path} has no rows but failed ones; name another group")
    n_rows = min(wanted.sample_rows, len(valid))
    rows = valid.rows(np.sort(Order(len(valid), wanted.seed).rows(0, np.arange(n_rows))))
    first = Sample(parent=parent, rows=rows, shift=np.zeros(width)).tokens(int(rows[0]))
    sample = Sample(parent=parent, rows=rows, shift=first.mean(0, dtype=np.float64))
    with progress_bar(n_rows, unit="row", description="fit components") as bar:
        sums = None
        for start, block in _in_order(in_processes(block_sums, sample, range(0, n_rows, BLOCK_ROWS), n_workers)):
            sums = block if sums is None else sums + block
            bar.update(min(BLOCK_ROWS, n_rows - start))
    assert sums is not None
    with waiting("computing the principal components"):
        (basis,) = in_processes(basis_from, (sample.shift, wanted), [sums], 1)  # in one thread of linear algebra, too
    return basis


def block_sums(sample: Sample, start: int) -> tuple[int, Sums]:
    """Of a block of the sample's rows, row by row; also where it begins."""
    first, *others = sample.rows[start : start + BLOCK_ROWS].tolist()
    sums = Sums.of(sample.tokens(first), sample.shift)
    for row in others:
        sums += Sums.of(sample.tokens(row), sample.shift)
    return start, sums


def _in_order(blocks: Iterator[tuple[int, Sums]]) -> Iterator[tuple[int, Sums]]:
    """As they follow each other; few wait, since few are in hand at once."""
    waiting: dict[int, Sums] = {}
    following = 0
    for start, block in blocks:
        waiting[start] = block
        while following in waiting:
            yield following, waiting.pop(following)
            following += BLOCK_ROWS


def basis_from(how: tuple[np.ndarray, Request], sums: Sums) -> Basis:
    """The leading eigenvectors of the sample's covariance; a channel that does not vary is not divided."""
    shift, wanted = how
    mean = sums.total / sums.n
    covariance = sums.products / sums.n - np.outer(mean, mean)
    deviation = np.ones_like(mean)
    if wanted.standardised:
        measured = np.sqrt(np.maximum(np.diag(covariance), 0))
        deviation = np.where(measured > 0, measured, 1.0)
    covariance /= np.outer(deviation, deviation)
    values, vectors = np.linalg.eigh(covariance)
    unbiased = np.maximum(values[::-1], 0) * (sums.n / max(1, sums.n - 1))
    components = np.ascontiguousarray(vectors.T[::-1][: wanted.components])
    largest = np.abs(components).argmax(1)
    components *= np.where(components[np.arange(len(components)), largest] < 0, -1.0, 1.0)[:, None]
    return Basis(
        mean=shift + mean,
        deviation=deviation,
        components=components,
        eigenvalues=unbiased[: wanted.components],
        total_variance=unbiased.sum(keepdims=True),
    )


def _require_finite(tokens: np.ndarray) -> None:
    bad = ~np.isfinite(tokens).all(-1)
    if bad.any():
        which = tuple(np.argwhere(bad)[0].tolist())
        raise UserError(f"token {which} holds NaN or infinity; look at the image and the encoder's weights")
