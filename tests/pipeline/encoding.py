"""A store of one unit, made by the encoding actor's own class, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.encode import Block, UnitEncoder
from pipeline.encoders import registry
from pipeline.plan import GroupPlan
from storage import GroupReader, Staging, create_group, create_store
from storage.codecs import stored_arrays
from storage.identity import Identity
from storage.index import make_index


def encode_store(
    root: Path, groups: Sequence[GroupPlan], images: np.ndarray, labels: Sequence[int] | None = None
) -> None:
    """What the encoding actor does for `groups` to a store of one unit; without labels all are of one class."""
    keys = [f"{i}" for i in range(len(images))]
    classes = [0] * len(keys) if labels is None else list(labels)
    names = ["one" if labels is None else str(label) for label in classes]
    index = make_index(keys, classes, names, keys, [1] * len(keys))
    paths = [group.layout.path for group in groups]
    with Staging(root) as staging:
        create_store(root, groups[0].layout.store, index, {}, staging.run_id)
        digests = {
            g.layout.path: create_group(
                root,
                g.layout,
                g.identity,
                registry.provenance(g.spec),
                staging.run_id,
                more=registry.attributes(g.spec),
            )
            for g in groups
        }
        for path in paths:
            staging.prepare(path)
        encoder = UnitEncoder(root, groups, digests, batch=3, n_threads=1, run_id=staging.run_id)
        encoder.encode_and_publish(images, Block(unit=0, failures=[], timings_s={}, paths=paths), 0.0)


def shapes_of(identity: Identity) -> dict[str, tuple[int, ...]]:
    """Array name → shape of a sample of a group of this identity."""
    return {name: array.row_shape for name, array in stored_arrays(identity).items()}


def read_all(reader: GroupReader, name: str, n: int, view: int = 0) -> np.ndarray:
    """The first n rows of an array of a group."""
    out = np.empty((n, *reader[name].row_shape), reader[name].dtype)
    reader[name].read_into(range(n), view, out)
    return out
