"""What differs between two stores, or two groups: identity fields, samples, rows.

Rows are compared by the checksums in the receipts, so no array is read: two rows are called equal when the CRC-32C of
every view and array agree (unequal rows agree by chance once in 2³² chunks). Shard sizes may differ. What rows were
made of is compared likewise, where the receipts of both have the checksums of the images' bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from storage.identity import differing_fields
from storage.layout import GroupLayout
from storage.reader import Store
from storage.receipts import scan
from storage.samples import stored_samples

NAMED = 10  # rows or samples named, then a count


def diff_stores(a: Store, b: Store, groups: list[str] | None = None) -> Iterator[str]:
    """One line for everything in which `b` differs from `a`; none when they are equal. `groups` default to all."""
    about = ("source", "index_digest", "shard_rows")
    mine, other = ({k: v for k, v in store.attributes.items() if k not in about} for store in (a, b))
    for line in differing_fields(other, mine, (f"{a.root} has", f"{b.root} has")):
        yield f"store {line}"
    yield from _diff_samples(a, b)
    ours, theirs = (set(groups if groups is not None else store.groups()) for store in (a, b))
    for path in sorted(ours ^ theirs):
        with_group, without_group = (a, b) if path in ours else (b, a)
        yield f"{path}: in {with_group.root}, not in {without_group.root}"
    for path in sorted(ours & theirs):
        yield from diff_groups(a, path, b, path)
    if not ours & theirs:
        yield from _other_samples(a, sorted(ours), b, sorted(theirs), "rows made of other images")


def diff_groups(a: Store, path_a: str, b: Store, path_b: str) -> Iterator[str]:
    """Identity fields, arrays and rows in which group `path_b` of `b` differs from group `path_a` of `a`."""
    (layout_a, attributes_a), (layout_b, attributes_b) = a.group_layout(path_a), b.group_layout(path_b)
    path_a, path_b = layout_a.path, layout_b.path
    name = path_a if path_a == path_b else f"{path_a} and {path_b}"
    verbs = ("the first has", "the second has")
    for line in differing_fields(attributes_b["identity"], attributes_a["identity"], verbs):
        yield f"{name}: {line}"
    arrays_a, arrays_b = ({x.name: x for x in layout.arrays} for layout in (layout_a, layout_b))
    for array in sorted(arrays_a.keys() ^ arrays_b.keys()):
        yield f"{name}: array {array} is in the {'first' if array in arrays_a else 'second'} only"
    comparable = []
    for array in sorted(arrays_a.keys() & arrays_b.keys()):
        kinds = [(x.dtype, x.shape[1:]) for x in (arrays_a[array], arrays_b[array])]
        if kinds[0] != kinds[1]:
            yield f"{name}/{array}: {kinds[0][0]} {kinds[0][1]} in the first, {kinds[1][0]} {kinds[1][1]} in the second"
        else:
            comparable.append(array)
    if a.n_rows != b.n_rows:
        yield f"{name}: {a.n_rows} rows in the first, {b.n_rows} in the second; the common ones are compared"
    n_rows = min(a.n_rows, b.n_rows)
    yield from _other_samples(a, [path_a], b, [path_b], f"{name}: rows made of other images")
    states = [_checksums(x, layout, attributes["identity_digest"], comparable)
              for x, layout, attributes in ((a, layout_a, attributes_a), (b, layout_b, attributes_b))]  # fmt: skip
    for which, (_, written) in zip(("first", "second"), states, strict=True):
        yield from _named(np.flatnonzero(written[:n_rows] == 0), f"{name}: rows not written in the {which}")
    both = (states[0][1][:n_rows] == 1) & (states[1][1][:n_rows] == 1)
    for array in comparable:
        unequal = (states[0][0][array][:n_rows] != states[1][0][array][:n_rows]).any(axis=1)
        yield from _named(np.flatnonzero(unequal & both), f"{name}/{array}: rows differ")
    failed = (states[0][1][:n_rows] == 2) != (states[1][1][:n_rows] == 2)
    yield from _named(np.flatnonzero(failed & ~both), f"{name}: rows failed in one of them only")


def _checksums(
    store: Store, layout: GroupLayout, digest: str, arrays: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({array: uint32 (N, V)}, state of each row: 0 not written, 1 written, 2 failed) from the receipts."""
    crcs = {array: np.zeros((store.n_rows, store.n_views), dtype=np.uint32) for array in arrays}
    state = np.zeros(store.n_rows, dtype=np.uint8)
    for unit, receipt, reason in scan(store.root, layout, digest):
        if receipt is None or reason is not None:
            continue
        rows = layout.store.unit_rows(unit)
        state[rows.start : rows.stop] = 1
        state[[failure.row for failure in receipt.failed]] = 2
        for array in arrays:
            record = receipt.shard(array)
            assert record is not None
            crcs[array][rows.start : rows.stop] = record.crcs().reshape(-1, store.n_views)[: len(rows)]
    return crcs, state


def _other_samples(a: Store, paths_a: list[str], b: Store, paths_b: list[str], what: str) -> Iterator[str]:
    """Rows that both have stored, made of other bytes; the first of the paths that knows a row speaks for its store."""
    n_rows = min(a.n_rows, b.n_rows)
    (crcs_a, known_a), (crcs_b, known_b) = _samples(a, paths_a), _samples(b, paths_b)
    differ = (crcs_a[:n_rows] != crcs_b[:n_rows]) & known_a[:n_rows] & known_b[:n_rows]
    yield from _named(np.flatnonzero(differ), what)


def _samples(store: Store, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(CRC-32C of the bytes that each row was made of, uint32 (N,), which of them are known, bool (N,))."""
    crcs, known = np.zeros(store.n_rows, dtype=np.uint32), np.zeros(store.n_rows, dtype=bool)
    for path in paths:
        layout, attributes = store.group_layout(path)
        for _, receipt, reason in scan(store.root, layout, attributes["identity_digest"]):
            if receipt is None or reason is not None:
                continue
            rows = slice(*receipt.rows)
            of_unit, stored = stored_samples(receipt)
            new = stored & ~known[rows]
            crcs[rows] = np.where(new, of_unit, crcs[rows])
            known[rows] |= new
    return crcs, known


def _diff_samples(a: Store, b: Store) -> Iterator[str]:
    if a.attributes["index_digest"] == b.attributes["index_digest"]:
        return
    tables = [store.index.table.select(["key", "label", "class_name"]) for store in (a, b)]
    n_rows = min(a.n_rows, b.n_rows)
    for column in ("key", "label", "class_name"):
        first, second = (np.asarray(table[column].to_pylist()[:n_rows]) for table in tables)
        yield from _named(np.flatnonzero(first != second), f"index: {column} differs at rows")


def _named(rows: np.ndarray, what: str) -> Iterator[str]:
    if len(rows):
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        yield f"{what}: {', '.join(map(str, rows[:NAMED].tolist()))}{more}"
