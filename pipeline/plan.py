"""The plan of a run, made before anything is written: which groups, which units of each are missing, how many bytes.

The plan is what makes the work repeatable: rows are fixed by the index, units by the shard size, and a unit is in the
plan exactly when a group of the run lacks its receipt, or does it again (`redo.py`). Making it lists the source and
hashes the weight files; no model is built. `create` then makes the store and its groups, so that a dry run is a plan
that is not followed. A dry run needs no weights and fetches none: shapes are the catalogue's then, and a group that is
there is taken for one of these weights where nothing else of it differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.config import PrecomputeConfig
from pipeline.encoders import registry
from pipeline.encoders.weights import MissingWeightsError
from pipeline.redo import Done, changed_images, refuse_changed, resized_rows, units_to_redo
from pipeline.sources import Source
from storage import (
    ArrayLayout,
    GroupLayout,
    Staging,
    StoreLayout,
    create_group,
    create_store,
    open_store,
    space,
)
from storage.base.errors import StoreError, UserError
from storage.base.shown import counted
from storage.codecs import PLAIN, codec_named, stored_arrays
from storage.identity import Identity, parse, require_same
from storage.index import Index
from storage.layout import METADATA
from storage.metadata import read_attributes, typed_attributes
from storage.receipts import scan
from storage.roots import Root
from storage.samples import Group
from storage.schema import GroupAttributes
from storage.writer import NEW_GROUP, check_group, check_store

ONLY_WEIGHTS = (
    "without the weights: their SHA-256, so whether a group that is there was made with the same ones; and that they "
    "can be loaded"
)


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One encoder's group: what makes it, what it is, where it goes."""

    spec: registry.EncoderSpec
    layout: GroupLayout
    identity: Identity
    lacks: str = ""  # in a dry run: why its weights are not at hand, and the remedy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the job needs to know.

    `missing` maps a unit to the paths of the groups that lack it or do it again, `redo` to the latter.
    """

    root: Root
    layout: StoreLayout
    index: Index
    groups: tuple[GroupPlan, ...]
    digests: Mapping[str, str]
    missing: Mapping[int, tuple[str, ...]]
    failed_before: int  # samples recorded as failed in units that are done
    free_bytes: float  # where the store lies; infinite on an object store
    redo: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[Group, ...] = ()  # groups of the store that the run does not write
    failed_standing: int = 0  # samples recorded as failed, in any group, that this run does not do again
    notes: tuple[str, ...] = ()

    @property
    def n_images_missing(self) -> int:
        """Images of the units that are not done."""
        return sum(len(self.layout.unit_rows(unit)) for unit in self.missing)

    @property
    def bytes_missing(self) -> int:
        """Bytes that the missing units will take."""
        sample_bytes = {group.layout.path: group.layout.sample_bytes for group in self.groups}
        return sum(
            len(self.layout.unit_rows(unit)) * sum(sample_bytes[path] for path in paths)
            for unit, paths in self.missing.items()
        )


def plan_groups(
    config: PrecomputeConfig, layout: StoreLayout, index_digest: str, root: Root | None = None
) -> tuple[GroupPlan, ...]:
    """The groups that the configuration names, in its order, latents first; `root` is where a dry run finds their like.

    Raises UserError for unknown encoders, one group asked for twice and, except in a dry run, missing weights.
    """
    arithmetic: dict[str, Any] = {"precision": config.precision, "compiled": config.compile}
    specs = [
        *registry.resolve_all(
            config.latents,
            config.latents_weights,
            "latents",
            partial(registry.resolve_latents, dtype=config.features_dtype, fetch=not config.dry_run, **arithmetic),
        ),
        *registry.resolve_all(
            config.features,
            config.features_weights,
            "features",
            partial(registry.resolve_features, dtype=config.features_dtype, **arithmetic),
        ),
    ]
    if codec_named(config.features_dtype) != PLAIN and not any(spec.kind == "features" for spec in specs):
        raise UserError(
            f"--features-dtype {config.features_dtype} has nothing to quantise: --features is none, and --latents "
            f"{config.latents} has no tokens; leave one of them out"
        )
    groups = []
    for asked in specs:
        spec, lacks = replace(asked, fetch=not config.dry_run), ""
        try:
            identity = registry.describe(spec, resolution=config.resolution)
        except MissingWeightsError as error:
            known = registry.outline(spec, resolution=config.resolution) if config.dry_run else None
            if known is None:
                raise
            identity, lacks = known, str(error)
        identity = identity.of_samples(config.views, index_digest)
        path = f"{spec.kind}/{spec.store_name}"
        if lacks and root is not None:
            identity = _presumed(root, path, identity)
        arrays = tuple(
            ArrayLayout(name=array, dtype=dtype, row_shape=shape, store=layout)
            for array, (dtype, shape) in sorted(stored_arrays(identity).items())
        )
        groups.append(
            GroupPlan(spec=spec, layout=GroupLayout(path=path, arrays=arrays), identity=identity, lacks=lacks)
        )
    return tuple(groups)


def _presumed(root: Root, path: str, known: Identity) -> Identity:
    """The identity of the group that is there, where it agrees with all that is known; else what is known.

    Raises StoreError where it does not agree.
    """
    attributes = read_attributes(root, f"{path}/{METADATA}")
    if attributes is None:
        return known
    where = root.at(f"{path}/{METADATA}")
    stored = typed_attributes(GroupAttributes, attributes, where).identity
    wanted = known.plain()
    require_same(wanted, {name: stored.get(name) for name in wanted}, root.at(path), NEW_GROUP)
    return parse(type(known), stored, where, NEW_GROUP)


def make_plan(config: PrecomputeConfig, source: Source, index: Index, root: Root) -> Plan:
    """List what is missing; writes nothing. Raises StoreError when the store or a group there was made differently."""
    layout = StoreLayout(
        n_rows=len(index), views=config.views, resolution=config.resolution, shard_rows=config.shard_rows
    )
    groups = plan_groups(config, layout, index.digest(), root)
    check_store(root, layout, index)
    digests = {group.layout.path: group.identity.digest for group in groups}
    for group in groups:
        check_group(root, group.layout.path, group.identity)
    others, notes = _other_groups(root, tuple(digests))
    asked: list[Group] = [(group.layout, digests[group.layout.path]) for group in groups]
    missing: dict[int, list[str]] = {}
    done = Done(resized_rows(root, index))
    for group_layout, digest in (*asked, *others):
        path = group_layout.path
        for unit, receipt, reason in scan(root, group_layout, digest):
            if receipt is not None and reason is None:
                done.add(path, receipt)
            elif path in digests:
                missing.setdefault(unit, []).append(path)
    redo, redo_notes = units_to_redo(source, index, done, tuple(digests), every=config.redo_failed)
    to_do = {unit: [*missing.get(unit, ()), *redo.get(unit, ())] for unit in sorted({*missing, *redo})}
    changed, what = changed_images(root, source, index, done)
    refuse_changed(changed, what, lambda row: row // layout.shard_rows, to_do)
    if changed:
        notes.append(f"warning: {what}; the store holds what was made of them then")
    return Plan(
        root=root,
        layout=layout,
        index=index,
        groups=groups,
        digests=digests,
        missing={unit: tuple(path for path in digests if path in paths) for unit, paths in to_do.items()},
        failed_before=len({row for row in done.failed_rows() if row // layout.shard_rows not in to_do}),
        free_bytes=space.free_bytes(root),
        redo={unit: tuple(paths) for unit, paths in redo.items()},
        others=others,
        failed_standing=len(done.failed_rows(redo)),
        notes=(*notes, *redo_notes),
    )


def _other_groups(root: Root, asked: Sequence[str]) -> tuple[tuple[Group, ...], list[str]]:
    """The store's groups that are not asked for, and what is to be said of those that cannot be read."""
    others: list[Group] = []
    notes: list[str] = []
    try:
        store = open_store(root)
    except StoreError:  # there is none yet, or its metadata is restored before anything is encoded
        return (), notes
    for path in store.groups():
        if path not in asked:
            try:
                layout, attributes = store.group_layout(path)
                others.append((layout, attributes["identity_digest"]))
            except StoreError as error:
                notes.append(f"warning: what failed in {path} is not counted: {error}")
    return tuple(others), notes


def require_space(plan: Plan) -> None:
    """Raise UserError when the disk has no room for what is missing."""
    space.require_space(plan.root, plan.bytes_missing, plan.free_bytes, "name another STORE")


def create(plan: Plan, source: Source, staging: Staging) -> None:
    """Make the store and the groups of the plan, or complete what a killed run left of them.

    Raises StoreError when another run has made them differently meanwhile.
    """
    create_store(plan.root, plan.layout, plan.index, source.provenance(), staging.run_id)
    for group in plan.groups:
        provenance = {"source": source.provenance(), **registry.provenance(group.spec)}
        more = registry.attributes(group.spec)
        create_group(plan.root, group.layout, group.identity, provenance, staging.run_id, more=more)
        staging.prepare(group.layout.path)


def describe_plan(plan: Plan) -> str:
    """The plan in a few lines, printed before the work starts."""
    labels = plan.index.labels
    n_classes = len(np.unique(labels[labels >= 0]))
    unlabelled = int((labels < 0).sum())
    of_classes = f"of {n_classes} classes" if n_classes else "without labels (−1)"
    if n_classes and unlabelled:
        of_classes += f", {unlabelled} without a label (−1),"
    lines = [
        f"store      {plan.root}",
        f"images     {len(plan.index)} {of_classes} at {plan.layout.resolution} px, "
        f"views {', '.join(plan.layout.views)}",
        f"units      {plan.layout.n_units:,} of {plan.layout.shard_rows} rows, {len(plan.missing)} to do",
    ]
    for group in plan.groups:
        arrays = ", ".join(f"{a.name} {'×'.join(map(str, a.row_shape))} {a.dtype}" for a in group.layout.arrays)
        units = [unit for unit, paths in plan.missing.items() if group.layout.path in paths]
        n_bytes = sum(len(plan.layout.unit_rows(unit)) for unit in units) * group.layout.sample_bytes
        todo = f"{counted(len(units), 'unit')} to encode, {space.size(n_bytes)}"
        state = todo if units else "reused, every unit is there"
        lines.append(f"{group.layout.path}  {arrays}  {group.layout.sample_bytes} bytes an image  {state}")
    free = "" if math.isinf(plan.free_bytes) else f", {space.size(plan.free_bytes)} free"
    lines.append(f"to write   {space.size(plan.bytes_missing)}{free}")
    for group in plan.groups:
        if group.lacks:
            lines.append(f"weights    {group.lacks}")
    if any(group.lacks for group in plan.groups):
        lines.append(f"unknown    {ONLY_WEIGHTS}")
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)
