"""`python -m storage derive`: features made of a group that is stored, without images or encoders.

    --codec rotated2    its patch tokens in a codec; what is no patch token, `cls` say, is copied
    --pca 8             their leading principal components (`principal.py`), as float16 or in a codec; nothing is copied

Child row i is a function of parent row i's tokens, its number and view and, for components, of a basis that is fitted
once and kept in the group's attributes. Products of matrices are made by one thread, since with several they are
rounded otherwise, and a code at a threshold would be another. So on one kind of processor every byte is the same,
whatever the number of workers and however often the work was killed.

The child's identity is its parent's with another codec or width, and `derived_from` the parent's digest and, for
components, how the basis was fitted and its digest.

A row that failed in the parent fails in the child, with its reason; checksums of images are the parent's, and so are
statistics of what is copied. Those of components are made; those of coded tokens are not: decoding what was encoded
would take as long again. A receipt's `made.parent_crc32c` is of the parent's chunks, so that a unit which the parent
encoded again, after images were mended, is derived again.

Cost: the parent read once. A process a core reads, encodes and publishes units of its own, each with one thread of
linear algebra; a thread of each reads the rows after those that are encoded. Memory: a coded unit and a few rows of the
parent a process. `python -m benchmarks.derive` compares the rate with reading alone and encoding alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from storage import space
from storage.base.console import progress_bar, say
from storage.base.ending import command, rows, say_next
from storage.base.errors import StoreError, UserError
from storage.base.options import argument, check_ranges, one_of, option
from storage.codecs import CODECS, PLAIN, TOKENS, Codec, codec_of
from storage.final_norm import ATTRIBUTE
from storage.identity import FeaturesIdentity
from storage.layout import METADATA, RECEIPTS_DIR, ArrayLayout, GroupLayout
from storage.metadata import check_identity, read_attributes
from storage.principal import BASIS, Basis, Request, fitted, stored_basis
from storage.processes import in_processes
from storage.reader import GroupReader, Store, open_store
from storage.receipts import look_at, read_receipt, rows_crc32c, scan
from storage.roots import Root
from storage.staging import Staging
from storage.statistics import unit_sums
from storage.writer import check_group, create_group, publish_unit

FEATURES = "features/"
CODED = [spelling for spelling, codec in CODECS.items() if codec is not PLAIN]
ROWS_AHEAD = 16  # read at once, while as many are encoded
PCA_SAMPLE = 4096  # a million tokens of 16 × 16 grids
PARENT_CRC32C = "parent_crc32c"


@dataclass(frozen=True, kw_only=True)
class DeriveConfig:
    """`derive`: which group becomes what."""

    store: str = argument("store root or URL")
    group: str = argument("features group to derive from: features/NAME, or NAME")
    codec: str = option("", f"how patch tokens, or their components, are stored: {', '.join(CODED)}")
    pca: int = option(0, "keep so many leading principal components of the patch tokens; 0: the tokens", at_least=0)
    pca_sample: int = option(PCA_SAMPLE, "rows that the components are fitted to", at_least=1)
    pca_seed: int = option(0, "which rows these are", at_least=0, at_most=2**63 - 1)
    pca_standardise: bool = option(False, "divide each channel by its deviation first, as ReDi does")
    name: str = option("", "of the new group (default: the parent's, pcaK and the codec)")
    workers: int = option(0, "processes that encode; 0: the cores", at_least=0)

    def __post_init__(self) -> None:
        if self.codec:
            one_of("--codec", self.codec, CODED)
        check_ranges(self)
        if not self.codec and not self.pca:
            raise UserError(f"nothing is to be derived; pass --codec ({', '.join(CODED)}), --pca K, or both")
        if not self.pca and (self.pca_sample, self.pca_seed, self.pca_standardise) != (PCA_SAMPLE, 0, False):
            raise UserError("--pca-sample, --pca-seed and --pca-standardise are of components; pass --pca K too")

    @property
    def components(self) -> Request | None:
        """Which are asked for, if any."""
        if not self.pca:
            return None
        return Request(
            components=self.pca, sample_rows=self.pca_sample, seed=self.pca_seed, standardised=self.pca_standardise
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs; it pickles."""

    root: Root
    run_id: str
    parent: GroupReader[FeaturesIdentity]
    layout: GroupLayout
    identity: FeaturesIdentity
    digest: str
    basis: Basis | None = None

    @property
    def codec(self) -> Codec:
        """The child's."""
        return codec_of(self.identity)


def derive(config: DeriveConfig) -> None:
    """Make the group, or finish it. Raises UserError or StoreError in one line; KeyboardInterrupt after a signal."""
    child = derive_group(
        config.store,
        config.group,
        config.codec,
        components=config.components,
        name=config.name,
        n_workers=config.workers,
    )
    store = open_store(config.store)
    parent = features_path(store, config.group)
    old, new = (sum(array.chunk_bytes for array in store.group_layout(path)[0].arrays) * store.n_views
                for path in (parent, child))  # fmt: skip
    say(*rows({"derived": child, "bytes": f"an image: {new:,}, of {old:,} in {parent}"}).splitlines())
    say_next(command("storage", "verify", f"{config.store.rstrip('/')}/{child}", "--deep"))


def derive_group(
    where: str | os.PathLike[str] | Root,
    group: str,
    codec: str = "",
    *,
    components: Request | None = None,
    name: str = "",
    n_workers: int = 0,
) -> str:
    """Derive a group and return its path; see the module. Without a `codec` components are float16.

    Raises StoreError for a parent that is not complete, or a child of another identity, and UserError for what cannot
    be encoded or does not fit on the disk. A signal ends the work after the units that are in hand: KeyboardInterrupt.
    """
    store = open_store(where)
    path = features_path(store, group)
    parent = store.group(path, n_threads=1 if store.root.path is not None else None)
    try:
        parts = [f"pca{components.components}" if components else "", codec]
        child = features_path(store, name or "-".join([path, *filter(None, parts)]))
        stored_as = CODECS[codec] if codec else PLAIN
        basis = _basis(store, parent, child, components, stored_as, n_workers) if components else None
        projection = (components, basis) if components and basis else None
        layout, identity = derived(parent, child, stored_as, projection)
        check_group(store.root, child, identity, "choose another --name, or remove that group to derive it again")
        todo = units_to_do(store, parent, layout, identity.digest)
        rows_todo = sum(len(store.layout.unit_rows(unit)) for unit in todo)
        free = space.free_bytes(store.root)
        space.require_space(store.root, rows_todo * layout.sample_bytes, free, "derive with fewer bits")
        with Staging(store.root) as staging:
            provenance = {**parent.attributes.get("provenance", {}), "derived_from": path}
            more: dict[str, Any] = {BASIS: basis.packed()} if basis else {}
            if ATTRIBUTE in parent.attributes and not basis:
                more[ATTRIBUTE] = parent.attributes[ATTRIBUTE]
            digest = create_group(store.root, layout, identity, provenance, staging.run_id, more=more)
            staging.prepare(child)
            job = Job(
                root=store.root, run_id=staging.run_id, parent=parent, layout=layout, identity=identity, digest=digest,
                basis=basis,
            )  # fmt: skip
            with progress_bar(
                store.n_rows, unit="row", done=store.n_rows - rows_todo, description=f"derive {child}"
            ) as bar:
                for unit in in_processes(derive_unit, job, todo, n_workers):
                    bar.update(len(store.layout.unit_rows(unit)))
    finally:
        parent.close()
    n_failed = len(parent.failures)
    failed = f", {n_failed} failed as in {path}" if n_failed else ""
    say(f"{store.root.at(child)}: {store.n_rows} rows, {len(todo)} of {store.layout.n_units} units new{failed}")
    return child


def features_path(store: Store, name: str) -> str:
    """`features/NAME` of NAME or features/NAME, a slash behind it or not. Raises UserError for latents: no codecs."""
    name = name.rstrip("/")
    if name.startswith("latents/"):
        raise UserError(f"{name} are latents, and codecs are for features; name a group features/NAME")
    path = name if name.startswith(FEATURES) else FEATURES + name
    GroupLayout(path=path, arrays=())  # raises UserError for what is no name
    return path


def _basis(
    store: Store,
    parent: GroupReader[FeaturesIdentity],
    child: str,
    wanted: Request,
    codec: Codec,
    n_workers: int,
) -> Basis:
    """The basis of the group that was begun, or a new one; whether it is the one that is wanted, its identity says.

    Raises UserError, before anything is fitted, for components that the codec cannot take.
    """
    check_parent(parent)
    shape = (*parent.shapes(decoded=True)[TOKENS].row_shape[:-1], wanted.components)
    codec.arrays(*shape)
    begun = read_attributes(store.root, f"{child}/{METADATA}")
    if begun is None:
        return fitted(parent, wanted, n_workers)
    basis = stored_basis(begun, store.root.at(child))
    if basis is None:
        raise StoreError(f"{store.root.at(child)} is there and holds no components; choose another --name")
    return basis


def check_parent(parent: GroupReader[FeaturesIdentity], codec: Codec | None = None) -> None:
    """Raise UserError for a group without patch tokens, in codes, whose errors would add up, or in `codec` already.

    And for components: their basis is of the tokens of the group that they were made of, and stays with them.
    """
    if TOKENS not in parent.arrays:
        raise UserError(f"{parent.path} holds {', '.join(parent.arrays)} and no patch tokens; name another group")
    stored = parent.codec
    if not stored.exact:
        raise UserError(
            f"{parent.path} is in {stored.spelling} codes, which are right on average only: errors would add up; "
            "derive from the group of float16 or int8, or run `make precompute` with --features-dtype"
        )
    pca = (parent.identity.derived_from or {}).get("pca")
    if pca is not None:
        source = parent.attributes.get("provenance", {}).get("derived_from", "the group that they are of")
        raise UserError(
            f"{parent.path} holds principal components, whose basis a group derived from it would not have; derive "
            f"from {source} at once, with --pca K and --codec (those of {parent.path}: {_options(pca)})"
        )
    if codec is not None and stored.name == codec.name:
        others = ", ".join(spelling for spelling in CODED if spelling != stored.spelling)
        raise UserError(
            f"{parent.path} is {stored.spelling} already, and nothing is to be done; use it, or choose another "
            f"--codec: {others}"
        )


def _options(pca: Mapping[str, Any]) -> str:
    """What was asked of components, as options of the command."""
    asked = f"--pca {pca.get('components')} --pca-sample {pca.get('sample_rows')} --pca-seed {pca.get('seed')}"
    return asked + (" --pca-standardise" if pca.get("standardised") else "")


def derived(
    parent: GroupReader[FeaturesIdentity], path: str, codec: Codec, components: tuple[Request, Basis] | None = None
) -> tuple[GroupLayout, FeaturesIdentity]:
    """Layout and identity of the group at `path` that the parent becomes. Raises UserError as `check_parent` does."""
    check_parent(parent, None if components else codec)
    kept = [] if components else [array for array in parent.layout.arrays if array.name not in parent.codec.names]
    arrays = {array.name: array for array in kept}
    row_shape = parent.shapes(decoded=True)[TOKENS].row_shape
    if components:
        row_shape = (*row_shape[:-1], components[0].components)
    for name, (dtype, shape) in codec.arrays(*row_shape).items():
        if name in arrays:
            raise UserError(f"{parent.path} has an array {name} of its own, which {codec.spelling} needs; rename it")
        arrays[name] = ArrayLayout(name=name, dtype=dtype, row_shape=shape, store=parent.layout.store)
    origin: dict[str, Any] = {"identity_digest": parent.identity_digest, "dtype": parent.identity.dtype}
    if parent.identity.codec is not None:
        origin["codec"] = parent.identity.codec
    changed: dict[str, Any] = {"dtype": codec.dtype, "codec": codec.identity, "derived_from": origin}
    if components:
        wanted, basis = components
        origin["pca"] = {**asdict(wanted), "basis_sha256": basis.digest}
        changed |= {"width": row_shape[-1], "tokens": parent.identity.tokens and "patch"}
    identity = dataclasses.replace(parent.identity, **changed)
    layout = GroupLayout(path=path, arrays=tuple(arrays[name] for name in sorted(arrays)))
    check_identity(layout, identity, path)
    return layout, identity


def units_to_do(store: Store, parent: GroupReader[Any], layout: GroupLayout, digest: str) -> list[int]:
    """Units that are not done, or were made of what the parent has encoded again since."""
    todo = []
    of_parent = scan(store.root, parent.layout, parent.identity_digest)
    for (unit, made_of, _), (_, receipt, reason) in zip(of_parent, scan(store.root, layout, digest), strict=True):
        if made_of is None:
            raise StoreError(f"unit {unit} of {parent.path} vanished; finish that group, then derive again")
        if receipt is None or reason is not None or receipt.made.get(PARENT_CRC32C) != rows_crc32c(made_of):
            todo.append(unit)
    return todo


def derive_unit(job: Job, unit: int) -> int:
    """Make and publish one unit; returns it. Raises UserError naming a row that the codec cannot carry."""
    made_of = read_receipt(job.root, job.parent.layout, unit)
    if made_of is None:
        raise StoreError(f"unit {unit} of {job.parent.path} vanished; finish that group, then derive again")
    rows = job.layout.store.unit_rows(unit)
    failed = {failure.row for failure in made_of.failed}
    present = [row for row in rows if row not in failed]
    arrays = {array.name: np.zeros((len(rows), *array.shape[1:]), dtype=array.dtype) for array in job.layout.arrays}
    read_s = encode_s = 0.0
    start_s = time.perf_counter()
    for block, stored in _read_ahead(job.parent, present):
        read_s += (read_end_s := time.perf_counter()) - start_s
        for i, row in enumerate(block):
            for name, values in _encoded(job, row, {name: array[i] for name, array in stored.items()}).items():
                arrays[name][row - rows.start] = values
        encode_s += (start_s := time.perf_counter()) - read_end_s
    before, done = look_at(job.root, job.layout, unit, job.digest)
    statistics = {
        name: sums
        for name, sums in made_of.statistics.items()
        if name.partition(".")[0] in arrays and name.partition(".")[0] not in job.codec.names
    }
    if job.basis is not None:
        sums = unit_sums(job.layout, arrays, np.array(present, dtype=np.int64) - rows.start, job.codec, rows.start)
        statistics = {name: of.packed() for name, of in sums.items()}
    publish_unit(
        job.root,
        job.layout,
        job.digest,
        unit,
        arrays,
        made_of.failed,
        job.run_id,
        {"wait for reading": round(read_s, 4), "encode": round(encode_s, 4)},
        statistics=statistics,
        made={PARENT_CRC32C: rows_crc32c(made_of)},
        sample_crc32c=made_of.sample_crcs(),
        replaces=before if before is not None and (done or not before.shards) else None,
    )
    return unit


def _encoded(job: Job, row: int, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The child's arrays (V, *row_shape) of a row, of the parent's."""
    views = np.arange(job.layout.store.n_views)
    rows = np.full_like(views, row)
    tokens = job.parent.codec.decode(stored, rows, views, dtype=np.float32)
    try:
        if job.basis is not None:
            return job.codec.encode(job.basis.project(tokens), rows, views)
        coded = job.codec.encode(tokens, rows, views)
    except UserError as error:
        unit = row // job.layout.store.shard_rows
        parent, child = job.parent.path, job.layout.path
        raise UserError(
            f"{parent}, row {row}, (view, token) in brackets: {error}. {child} is unfinished and keeps the units that "
            f"are done: encode the row again (remove {RECEIPTS_DIR}/{parent}/{unit:08d}.json, then run its "
            f"`make precompute`) and run the same derive, or remove {child} and {RECEIPTS_DIR}/{child}"
        ) from None
    return {**{name: stored[name] for name in stored if name not in job.parent.codec.names}, **coded}


def _read_ahead(parent: GroupReader[Any], rows: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[str, np.ndarray]]]:
    """Blocks of rows and the parent's arrays of them (B, V, *row_shape); one is read while the caller has another."""
    views = np.arange(parent.layout.store.n_views)

    def read(block: Sequence[int]) -> dict[str, np.ndarray]:
        flat = parent.gather(np.repeat(block, len(views)), np.tile(views, len(block)))
        return {name: array.reshape(len(block), len(views), *array.shape[1:]) for name, array in flat.items()}

    blocks = [rows[i : i + ROWS_AHEAD] for i in range(0, len(rows), ROWS_AHEAD)]
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead = [pool.submit(read, block) for block in blocks[:1]]
        for i, block in enumerate(blocks):
            stored = ahead.pop().result()
            ahead += [pool.submit(read, each) for each in blocks[i + 1 : i + 2]]
            yield block, stored
