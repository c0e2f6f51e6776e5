"""Features of the wrong photograph: a group whose row i holds what another row of the same class has in another group.

A model aligned with them is told the class and what its images have in common, and nothing of the image itself. Rows
of a class are shuffled into a ring and each takes its successor's, every view of it, so each row's features are used
once. A class of one row keeps its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from storage import GroupReader, Staging, StoreError, create_group, open_store, publish_unit
from storage.layout import GroupLayout
from storage.receipts import scan


def others_of_the_class(labels: np.ndarray, usable: np.ndarray, seed: int) -> np.ndarray:
    """For each row the row whose features it is given, int64 (N,); −1 where it is not `usable`, bool (N,)."""
    rng = np.random.default_rng(seed)
    donors = np.full(len(labels), -1, dtype=np.int64)
    for label in np.unique(labels[usable]):
        ring = rng.permutation(np.flatnonzero(usable & (labels == label)))
        donors[ring] = np.roll(ring, -1)
    return donors


def write_control(where: Path, features: str, name: str, seed: int = 0) -> None:
    """Write features/NAME beside features/FEATURES of the store; units that are there are kept. Raises StoreError."""
    store = open_store(where)
    group = store.group(f"features/{features}")
    usable = np.ones(store.n_rows, dtype=bool)
    usable[group.failed_rows] = False
    donors = others_of_the_class(store.classes.labels, usable, seed)
    others = {**group.identity.others, "rows": f"of another row of the same class, seed {seed}"}
    identity = replace(group.identity, others=others)
    layout = GroupLayout(path=f"features/{name}", arrays=group.layout.arrays)
    with Staging(where) as staging:
        digest = create_group(staging.root, layout, identity, group.attributes["provenance"], staging.run_id)
        staging.prepare(layout.path)
        for unit in [unit for unit, _, reason in scan(staging.root, layout, digest) if reason is not None]:
            rows = store.layout.unit_rows(unit)
            arrays = {array: _of(group, array, donors[rows.start : rows.stop]) for array in group.arrays}
            failed = [failure for failure in group.failures if failure.row in rows]
            publish_unit(staging.root, layout, digest, unit, arrays, failed, staging.run_id, {})
    group.close()


def is_whole(where: Path, name: str) -> bool:
    """Whether the store has the group, complete."""
    try:
        open_store(where).group(f"features/{name}").close()
    except StoreError:
        return False
    return True


def _of(group: GroupReader, array: str, donors: np.ndarray) -> np.ndarray:
    """(n, V, *row_shape) of the donors, zeros where there is none."""
    reader = group[array]
    n_views = group.layout.store.n_views
    there = np.flatnonzero(donors >= 0)
    found = np.zeros((len(donors), n_views, *reader.row_shape), dtype=reader.dtype)
    for view in range(n_views):
        read = np.empty((len(there), *reader.row_shape), dtype=reader.dtype)
        reader.read_into(donors[there], view, read)
        found[there, view] = read
    return found
