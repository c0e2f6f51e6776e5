"""Mean and variance of a features group at every place of its grid: what features are normalised by as latents.

    statistics/<group>.safetensors      mean, var                           float64 (D, h, w)
                                        mean_cls_token, var_cls_token       float64 (D,), where class tokens are stored

These are the names of RAE's public files (arXiv 2510.11690), which are read as well. A receipt has sums a channel only:
sums of every place would be 3 MB a unit for DINOv2-B. So one pass over the group counts them (`python -m storage
statistics STORE features/NAME --places`) and publishes one file, which names the rows that it is of: their checksums,
as the receipts have them. Of rows that were encoded again since, it is refused, and so are numbers that were changed.

Variances are the population's, over rows and views, of tokens as they are decoded. Sums of units are float64; they are
added in the order of units with what rounding leaves off (Knuth's two-sum), so that the file does not depend on how
many threads counted. Cost: every byte of the group is read once. Memory: a unit's sums a thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from storage.base.ending import command as command_line
from storage.base.errors import StoreError
from storage.codecs import TOKENS, decoded
from storage.identity import FeaturesIdentity
from storage.reader import GroupReader
from storage.roots import Root

FOLDER = "statistics"
OF_TOKENS, OF_CLASS = ("mean", "var"), ("mean_cls_token", "var_cls_token")
CLASS_TOKEN = "cls"
DIGEST = "sha256"  # of the numbers, in a file's metadata
ROWS_AT_ONCE = 32
HEADER_BYTES = 1 << 16
Sums = dict[str, np.ndarray]  # array → (2, *shape): sums of values and of squares


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaceStatistics:
    """Of tokens, float64 (D, h, w); of class tokens (D,), None where there are none."""

    mean: np.ndarray
    var: np.ndarray
    mean_class: np.ndarray | None = None
    var_class: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Under the names of the files."""
        own = dict(zip((*OF_TOKENS, *OF_CLASS), (self.mean, self.var, self.mean_class, self.var_class), strict=True))
        return {name: np.ascontiguousarray(values) for name, values in own.items() if values is not None}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the numbers, which a run names."""
        numbers = hashlib.sha256()
        for values in self.arrays().values():
            numbers.update(values.astype("<f8").tobytes())
        return numbers.hexdigest()

    def packed(self, **about: str) -> bytes:
        """As a file holds it."""
        return save(self.arrays(), metadata=about or None)


def key_of(path: str) -> str:
    """Where the statistics of a group lie below the store's root."""
    return f"{FOLDER}/{path}.safetensors"


def checked(arrays: Mapping[str, np.ndarray], where: str, fix: str, shape: tuple[int, ...] = ()) -> PlaceStatistics:
    """The statistics in arrays by name, of tokens of `shape` (D, h, w) if it is given. Raises StoreError.

    Leading axes of one are taken off, as public files have some.
    """
    if not set(OF_TOKENS) <= arrays.keys():
        names = ", ".join(sorted(arrays)[:4]) or "nothing"
        raise StoreError(f"{where} holds {names}; statistics of features are mean and var, (D, h, w); {fix}")
    mean, var = (_without_ones(arrays[name], 3) for name in OF_TOKENS)
    of_class = [_without_ones(arrays[name], 1) for name in OF_CLASS if name in arrays]
    wanted = shape or mean.shape
    if mean.ndim != 3 or (mean.shape, var.shape) != (wanted, wanted):
        raise StoreError(
            f"{where} is of tokens {_spelled(mean.shape)} (var {_spelled(var.shape)}), not {_spelled(wanted)}; {fix}"
        )
    if len(of_class) == 1 or any(values.shape != mean.shape[:1] for values in of_class):
        shapes = " and ".join(_spelled(values.shape) for values in of_class)
        raise StoreError(f"{where} has class tokens of {shapes}, not mean and var of {mean.shape[0]}; {fix}")
    numbers = [np.asarray(values, np.float64) for values in (mean, var, *of_class)]
    if not all(np.isfinite(values).all() for values in numbers) or any((v < 0).any() for v in numbers[1::2]):
        raise StoreError(f"{where} has means or variances that are NaN, infinite or below 0; {fix}")
    return PlaceStatistics(**dict(zip(("mean", "var", "mean_class", "var_class"), numbers, strict=False)))


def unpacked(raw: bytes, where: str, fix: str, shape: tuple[int, ...] = ()) -> PlaceStatistics:
    """The statistics in the bytes of a file of ours. Raises StoreError."""
    try:
        arrays = load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{where} is damaged ({' '.join(str(error).split())[:80]}); {fix}") from None
    return checked(arrays, where, fix, shape)


def shape_of(group: GroupReader[FeaturesIdentity]) -> tuple[int, ...]:
    """(D, h, w) of a group's tokens."""
    return (group.identity.width, *group.identity.token_grid)


def read(root: Root, group: GroupReader[FeaturesIdentity]) -> PlaceStatistics | None:
    """The statistics of a group, None where nobody counted them. Raises StoreError for those of other rows."""
    key = key_of(group.path)
    where, fix = root.at(key), f"run `{command(root, group.path)}`"
    try:
        if root.size(key) > 8 * (2 * int(np.prod(shape_of(group))) + 2 * group.identity.width) + HEADER_BYTES:
            raise StoreError(f"{where} is larger than statistics of {_spelled(shape_of(group))} are; {fix}")
        with root.open(key) as file:
            raw = file.read()
    except FileNotFoundError:
        return None
    about = metadata(raw)
    if {name: about.get(name) for name in _about(group)} != _about(group):
        raise StoreError(f"{where} is of other rows than {group.path} has now; {fix}")
    statistics = unpacked(raw, where, fix, shape_of(group))
    if about.get(DIGEST) != statistics.digest:
        raise StoreError(f"{where} is damaged (its numbers are not as they were written); {fix}")
    return statistics


def command(root: Root, path: str) -> str:
    """What counts them."""
    return command_line("storage", "statistics", str(root), path, "--places")


def publish(root: Root, group: GroupReader[FeaturesIdentity], statistics: PlaceStatistics, run_id: str) -> None:
    """Write the file, whole."""
    about = {**_about(group), DIGEST: statistics.digest}
    root.write(key_of(group.path), [statistics.packed(**about)], run_id)


def count(
    group: GroupReader[FeaturesIdentity], n_threads: int, progress: Callable[[int], object] = lambda n: None
) -> PlaceStatistics:
    """Mean and variance of a group that is there; `progress(1)` after every unit. Raises as reading does.

    Raises StoreError for a group without patch tokens, and where no row could be decoded.
    """
    group.require("token_grid", "width", arrays=[TOKENS])
    layout = group.layout.store
    total: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    n = 0
    with ThreadPoolExecutor(n_threads, thread_name_prefix="places") as pool:
        for n_of_unit, sums in pool.map(lambda unit: _unit_sums(group, unit), range(layout.n_units)):
            n += n_of_unit
            for name, values in sums.items():
                high, low = total.get(name, (np.zeros_like(values), np.zeros_like(values)))
                new = high + values
                part = new - high
                total[name] = new, low + ((high - (new - part)) + (values - part))
            progress(1)
    if not n:
        raise StoreError(f"{group.path}: no row could be decoded, so it has no statistics; mend the images")
    of = {name: (high + low) / n for name, (high, low) in total.items()}
    moments = {name: (first, np.maximum(second - np.square(first), 0)) for name, (first, second) in of.items()}
    mean, var = (values.T.reshape(shape_of(group)) for values in moments[TOKENS])
    of_class = moments.get(CLASS_TOKEN, (None, None))
    return PlaceStatistics(mean=mean, var=var, mean_class=of_class[0], var_class=of_class[1])


def _unit_sums(group: GroupReader[FeaturesIdentity], unit: int) -> tuple[int, Sums]:
    """(vectors a place, sums) of a unit, patches (2, T, D) and class tokens (2, D)."""
    n_views, failed = group.layout.store.n_views, set(group.failed_rows.tolist())
    present = np.array([row for row in group.layout.store.unit_rows(unit) if row not in failed], dtype=np.int64)
    names = [*group.codec_arrays, *[name for name in (CLASS_TOKEN,) if name in group.arrays]]
    sums: Sums = {}
    for start in range(0, len(present), ROWS_AT_ONCE):
        rows = np.repeat(present[start : start + ROWS_AT_ONCE], n_views)
        views = np.tile(np.arange(n_views), len(rows) // n_views)
        stored = decoded(group.codec, group.gather(rows, views, names), rows, views, dtype=np.float32)
        for name, values in stored.items():
            values = values.astype(np.float64)
            new = np.stack([values.sum(0), np.square(values).sum(0)])
            sums[name] = sums[name] + new if name in sums else new
    return len(present) * n_views, sums


def _about(group: GroupReader[Any]) -> dict[str, str]:
    return {"identity_digest": group.identity_digest, "rows_crc32c": f"{group.rows_crc32c:08x}"}


def metadata(raw: bytes) -> dict[str, str]:
    """What the bytes of a safetensors file say beside its tensors, {} of one that is none."""
    try:
        n = int.from_bytes(raw[:8], "little")
        about = json.loads(raw[8 : 8 + n]).get("__metadata__", {}) if n <= HEADER_BYTES else {}
    except (ValueError, AttributeError):
        return {}
    return about if isinstance(about, dict) else {}


def _without_ones(values: np.ndarray, ndim: int) -> np.ndarray:
    while values.ndim > ndim and values.shape[0] == 1:
        values = values[0]
    return values


def _spelled(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
