"""Making a store of numbers that another project has computed.

An importer describes what it found (`Incoming`); here it is published unit by unit, as the pipeline publishes, so an
import that was interrupted goes on where it was and ends with the same bytes. The identity says that the numbers were
imported, from which kind of file, and the SHA-256 that the importer took of its source: of what made them it can say
no more than the user does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.base.console import progress_bar, say
from storage.base.errors import UserError
from storage.base.options import check_ranges, option, required
from storage.codecs import codec_of
from storage.identity import Identity, LatentsIdentity
from storage.index import make_index
from storage.layout import ArrayLayout, GroupLayout, StoreLayout
from storage.receipts import scan
from storage.staging import Staging
from storage.statistics import unit_sums
from storage.writer import create_group, create_store, publish_unit

IMPORTED = (  # the first fields of an identity, in the order in which imports have always stored them
    *("kind", "name", "encoder", "weights_sha256", "source_sha256", "resolution", "dtype"),
    *("latent_scale_factor", "latent_shift_factor"),
)
SD_VAE_SCALE = 0.18215  # of the Stable Diffusion VAEs (Rombach et al., arXiv 2112.10752)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says about numbers that do not say it themselves."""

    name: str = required("what to call the encoder: the group is latents/NAME")
    resolution: int = option(256, "pixels a side of the encoded images", at_least=1)
    shard_rows: int = option(512, "samples a shard", at_least=1)
    latent_scale_factor: float | None = option(
        None, "default 0.18215 for repa-npy and hdf5, 1 for others and with statistics", above=0
    )
    latent_statistics: str = option(
        "",
        "file of a mean and a deviation a channel, as LightningDiT or REPA-E saves them, or none (default: the file of "
        "that project that lies beside the latents)",
    )
    dataset: str = option("", "hdf5: the dataset of moments (N, [V,] 2C, h, w) in a foreign file")
    labels: str = option("", "hdf5: the dataset of labels (N,) in a foreign file")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class IncomingGroup:
    """One group: path, identity, dtype and row shape by array, and `rows(range) -> {array: (n, V, *row_shape)}`."""

    path: str
    identity: Identity
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    rows: Callable[[range], Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """Everything an importer found."""

    keys: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[str]
    views: tuple[str, ...]
    resolution: int
    source: Mapping[str, Any]
    groups: Sequence[IncomingGroup]


def import_store(where: str, incoming: Incoming, options: ImportOptions) -> None:
    """Publish what was found into the store at `where`; units that are there already are not read again."""
    store = StoreLayout(
        n_rows=len(incoming.keys),
        views=incoming.views,
        resolution=incoming.resolution,
        shard_rows=options.shard_rows,
    )
    index = make_index(incoming.keys, incoming.labels, incoming.class_names, incoming.keys, [-1] * len(incoming.keys))
    with Staging(where) as staging:
        create_store(staging.root, store, index, incoming.source, staging.run_id)
        for group in incoming.groups:
            arrays = tuple(
                ArrayLayout(name=name, dtype=dtype, row_shape=shape, store=store)
                for name, (dtype, shape) in sorted(group.arrays.items())
            )
            layout = GroupLayout(path=group.path, arrays=arrays)
            identity = group.identity.of_samples(incoming.views, index.digest())
            codec = codec_of(identity, group.path)
            digest = create_group(staging.root, layout, identity, {"source": dict(incoming.source)}, staging.run_id)
            staging.prepare(layout.path)
            missing = [unit for unit, _, reason in scan(staging.root, layout, digest) if reason is not None]
            done = store.n_units - len(missing)
            with progress_bar(store.n_units, unit="shard", done=done, description=f"import {group.path}") as bar:
                for unit in missing:
                    rows = store.unit_rows(unit)
                    arrays_of_unit = _checked(group.rows(rows), layout, unit, incoming.keys)
                    sums = unit_sums(layout, arrays_of_unit, np.arange(len(rows)), codec, rows.start)
                    publish_unit(
                        staging.root, layout, digest, unit, arrays_of_unit, [], staging.run_id, {},
                        statistics={name: of.packed() for name, of in sums.items()},
                    )  # fmt: skip
                    bar.update(1)
            say(
                f"{staging.root.at(group.path)}: {len(incoming.keys)} rows, {len(missing)} of {store.n_units} units new"
            )


def latents_identity(
    options: ImportOptions,
    *,
    what: str,
    sha256: str,
    channels: int,
    size: tuple[int, int],
    scale: float,
    beside: Path | None = None,
    epsilon: float = 0.0,
) -> LatentsIdentity:
    """The identity of imported latents, with every field that the trainer reads.

    `beside` is where the project keeps its statistics, if it does, and `epsilon` what it adds to their variance.
    """
    file = statistics_file(options.latent_statistics, beside)
    normalisation = None
    if file is not None:
        from storage.weights.latent_statistics import read_statistics  # torch, which storage else does without

        normalisation = read_statistics(file, channels, epsilon=epsilon).plain()
        say(f"latents are normalised channel by channel with the statistics of {file}")
        scale = 1.0
    return LatentsIdentity(
        kind="latents",
        name=options.name,
        encoder=f"imported from {what}",
        weights_sha256="unknown",
        source_sha256=sha256,
        resolution=options.resolution,
        dtype="float16",
        latent_scale_factor=scale if options.latent_scale_factor is None else options.latent_scale_factor,
        latent_shift_factor=0.0,
        latent_normalisation=normalisation,
        latent_channels=channels,
        latent_size=size,
        order=IMPORTED,
    )


def latents_alone(
    source: Path,
    options: ImportOptions,
    *,
    kind: str,
    files: Iterable[tuple[str, int]],
    keys: Sequence[str],
    labels: Sequence[int],
    shape: tuple[int, ...],
    rows: Callable[[range], Mapping[str, np.ndarray]],
    views: tuple[str, ...] = ("original",),
    what: str,
    scale: float,
    beside: Path | None = None,
    epsilon: float = 0.0,
) -> Incoming:
    """A source of one latents group, whose moments have the shape (2C, h, w). `files` are names and sizes.

    What is not said here is as `latents_identity` has it.
    """
    group = IncomingGroup(
        path=f"latents/{options.name}",
        identity=latents_identity(
            options,
            what=what,
            sha256=sha256_of_listing(files),
            channels=shape[0] // 2,
            size=(shape[1], shape[2]),
            scale=scale,
            beside=beside,
            epsilon=epsilon,
        ),
        arrays={"moments": ("float16", shape)},
        rows=rows,
    )
    return Incoming(
        keys=keys,
        labels=labels,
        class_names=[str(label) for label in labels],
        views=views,
        resolution=options.resolution,
        source={"kind": kind, "path": str(source.absolute())},
        groups=[group],
    )


def statistics_file(named: str, beside: Path | None) -> Path | None:
    """The file of statistics that is taken; None, which is said, where there is none, or none is wanted."""
    if named == "none" or (not named and (beside is None or not beside.is_file())):
        if beside is not None:
            why = "--latent-statistics none" if named else f"there is no {beside}"
            say(f"{why}: latents are normalised by one factor, unless a run says --data.latent-normalisation channel")
        return None
    return Path(named) if named else beside


def whole_labels(values: Any, where: Path) -> list[int]:
    """Labels as integers. Raises UserError for what is none, since 1.5 is no class."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
        wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers == np.rint(numbers))))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: labels must be whole numbers ({error})") from error
    if len(wrong):
        raise UserError(f"{where}: labels must be whole numbers, got {values[int(wrong[0])]}")
    return [int(number) for number in numbers]


def sha256_of_listing(entries: Iterable[tuple[str, int]]) -> str:
    """SHA-256 (hex) over "name size LF" of every file: which files, not what is in them, which would mean two reads."""
    sha = hashlib.sha256()
    for name, size in entries:
        sha.update(f"{name} {size}\n".encode())
    return sha.hexdigest()


def require_folder(source: Path, what: str) -> None:
    """Raise UserError when `source` is not a folder."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; name the {what}")


def _checked(
    given: Mapping[str, np.ndarray], layout: GroupLayout, unit: int, keys: Sequence[str]
) -> dict[str, np.ndarray]:
    rows = layout.store.unit_rows(unit)
    arrays = {}
    for array in layout.arrays:
        values = np.asarray(given[array.name])
        if values.dtype.kind not in "fiu":
            raise UserError(f"{array.name} of {layout.path} must be real numbers, got {values.dtype}; mend the source")
        expected = (len(rows), layout.store.n_views, *array.row_shape)
        if values.shape != expected:
            raise UserError(
                f"rows {rows.start} to {rows.stop - 1} of {layout.path} have shape {values.shape}, not {expected}"
            )
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, dtype=array.dtype)
        if values.dtype.kind == "f":
            wrong = np.flatnonzero(~np.isfinite(values.reshape(len(rows), -1)).all(axis=1))
            if len(wrong):
                key = keys[rows.start + int(wrong[0])]
                raise UserError(
                    f"{key}: NaN, infinity or a number beyond {array.dtype} in {array.name}; mend the source"
                )
        arrays[array.name] = values
    return arrays
