"""Checking a whole store: is every byte what was written, and every number finite.

Always checked: metadata and index against their receipts and each other, every unit's receipt, the presence and size of
every shard, every shard's index against the rows its receipt calls present, shards and receipts of no unit, receipts of
no group, and that groups were made of the same images, by the checksums in their receipts.
`deep` reads everything besides: each chunk against its receipt and against the checksum beside it, which other programs
check, and each number of a floating-point array for NaN and infinity.

Every fault is one line that names the file and, where there is one, the row. One fault hides no other, except that
damaged metadata must be restored before what it describes can be looked at. Cost of `deep`: the store read once, on
all cores, a row in memory a core (of an object store, a shard).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context

import numpy as np
import pyarrow.compute as pc
from crc32c import crc32c

from storage.base.errors import StoreError
from storage.base.shown import shown
from storage.identity import Identity
from storage.layout import (
    EMPTY,
    GROUP_KINDS,
    METADATA,
    RECEIPTS_DIR,
    STORE_RECEIPT,
    ArrayLayout,
    GroupLayout,
)
from storage.metadata import group_identity
from storage.reader import Store, open_store
from storage.receipts import Receipt, check_metadata, scan
from storage.roots import Root, open_root
from storage.samples import Group, disagreements
from storage.shard import parse_shard_index
from storage.statistics import receipt_sums

AHEAD_PER_WORKER = 4
BYTES_A_PROCESS = 1 << 29  # what one reads in about the time that another takes to start
FAULTS_A_SHARD = 20  # of one kind, then a count

Progress = Callable[[int], object]
Read = Callable[[int, int], bytes]  # the bytes [start, stop) of a file
Unit = tuple[int, Receipt | None, str | None]  # as `scan` tells of it


def verify(
    where: str | os.PathLike[str], *, groups: list[str] | None = None, deep: bool = False, n_workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[str]:  # fmt: skip
    """One line for every fault of the store's `groups` (default: all); none when all is well.

    `n_workers` processes read when `deep` (default: as many as there are cores and work for); `progress(n)` hears of
    every n bytes looked at. Raises StoreError when there is no store at all or no such group.
    """
    try:
        store = open_store(where)
    except StoreError as error:
        if not open_root(where).children(RECEIPTS_DIR):
            raise
        yield str(error)
        return
    yield from _store_faults(store, deep)
    wanted = [path.rstrip("/") for path in groups] if groups is not None else store.groups()
    whole: dict[str, Group] = {}
    if groups is None:
        yield from _vanished_groups(store.root, wanted)
    for path in wanted:
        try:
            layout, attributes = store.group_layout(path)
        except StoreError as error:
            if groups is not None and path not in store.groups():
                raise
            yield str(error)
            continue
        whole[path] = (layout, attributes["identity_digest"])
        identity = group_identity(path, attributes["identity"], store.root.at(path))
        yield from contradictions(store, path, identity)
        yield from _stray_files(store.root, layout)
        units = scan(store.root, layout, attributes["identity_digest"])
        n_useful = n_workers or min(os.cpu_count() or 1, layout.sample_bytes * layout.store.n_rows // BYTES_A_PROCESS)
        n_processes = max(1, min(n_useful, layout.store.n_units)) if deep else 1
        yield from _each_unit(partial(unit_faults, store.root, layout, identity, deep), units, n_processes, progress)
    yield from disagreements(store.root, {**whole, **(_other_groups(store, wanted) if groups is not None else {})})


def unit_faults(root: Root, layout: GroupLayout, identity: Identity, deep: bool, task: Unit) -> tuple[int, list[str]]:
    """(bytes looked at, faults) of one unit: what the scan said of it, and its shards against its receipt."""
    unit, receipt, reason = task
    n_bytes, faults = 0, []
    if receipt is None or reason is not None:
        rows = layout.store.unit_rows(unit)
        faults.append(f"{root.at(layout.path)}: unit {unit}, rows {rows.start} to {rows.stop - 1}: {reason}")
    if receipt is None:
        return n_bytes, faults
    try:
        if reason is None:
            receipt_sums(layout, receipt, identity)
    except StoreError as error:
        faults.append(str(error))
    for array in layout.arrays:
        key = f"{layout.path}/{array.name}/{array.shard_key(unit)}"
        record = receipt.shard(array.name)
        if record is None or not record.has_crcs(array.n_shard_chunks):
            continue  # said by the scan
        try:
            size = root.size(key)
            n_bytes += size
            with _opened(root, key, whole=deep) as read:
                tail = read(max(0, size - array.index_bytes), size)
                index = parse_shard_index(tail, size, array, root.at(key))
                faults += _index_faults(array, unit, receipt, index, root.at(key))
                if deep:
                    faults += _chunk_faults(array, unit, receipt, index, read, root.at(key))
                    if size != len(_covered(index)) * array.stored_bytes + array.index_bytes:
                        faults.append(f"shard {root.at(key)} has bytes that belong to no row")
        except FileNotFoundError:
            continue  # said by the scan
        except StoreError as error:
            faults.append(str(error))
        except OSError as error:  # a bad sector: the other shards are still looked at
            faults.append(f"shard {root.at(key)} cannot be read: {error.strerror}")
    return n_bytes, faults


def _each_unit(
    check: Callable[[Unit], tuple[int, list[str]]], units: Iterator[Unit], n_processes: int, progress: Progress | None
) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        results: Iterator[tuple[int, list[str]]] = map(check, units)
        if n_processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")))
            # A bounded number at once: receipts wait in memory.
            batches = iter(lambda: list(islice(units, n_processes * AHEAD_PER_WORKER)), [])
            results = chain.from_iterable(pool.map(check, batch) for batch in batches)
        for n_bytes, faults in results:
            if progress is not None:
                progress(n_bytes)
            yield from faults


def _store_faults(store: Store, deep: bool) -> Iterator[str]:
    try:
        _, faults = check_metadata(store.root, STORE_RECEIPT)
        yield from faults
        if not faults:
            yield from _index_contradictions(store, deep)
    except StoreError as error:
        yield str(error)


def _index_contradictions(store: Store, deep: bool) -> Iterator[str]:
    """What no index of ours says, whoever sealed it. Keys are compared when `deep`: they are in memory together."""
    labels = store.classes.labels  # which compares its rows with the store's
    where = store.root.at("index.parquet")
    below = np.flatnonzero(labels < -1)
    if len(below):
        yield f"{where}: row {below[0]} has label {labels[below[0]]}; labels are at least 0, or -1 for none"
    if not deep:
        return
    n_keys = pc.count_distinct(store.index.table["key"]).as_py()
    if n_keys != store.n_rows:
        yield f"{where} has {n_keys} different keys in {store.n_rows} rows; each names one sample"
    if store.index.digest() != store.attributes["index_digest"]:
        yield f"{where} is not the index that the store was made of (its digest differs)"


def contradictions(store: Store, path: str, identity: Identity) -> Iterator[str]:
    """Where a group's identity says otherwise than the store that holds it."""
    pairs = {
        "kind": (identity.kind, path.partition("/")[0]),
        "resolution": (identity.resolution, store.resolution),
        "views": (identity.views, store.layout.views),
        "index_digest": (identity.index_digest, store.attributes["index_digest"]),
    }
    for name, (of_group, of_store) in pairs.items():
        if of_group is not None and of_group != of_store:
            yield f"{store.root.at(path)}: its identity says {name} {shown(str(of_group))}, the store has {of_store}"


def _other_groups(store: Store, wanted: list[str]) -> dict[str, Group]:
    """The groups that are not looked at for themselves, those that cannot be read left out."""
    others: dict[str, Group] = {}
    with contextlib.suppress(StoreError):  # a server that cannot list
        for path in store.groups():
            if path not in wanted:
                with contextlib.suppress(StoreError):
                    layout, attributes = store.group_layout(path)
                    others[path] = (layout, attributes["identity_digest"])
    return others


def _vanished_groups(root: Root, known_groups: list[str]) -> Iterator[str]:
    """Groups that have receipts and no metadata, so that nothing else would speak of them."""
    for kind in GROUP_KINDS:
        for name in root.children(f"{RECEIPTS_DIR}/{kind}"):
            if f"{kind}/{name}" not in known_groups:
                receipts = root.at(f"{RECEIPTS_DIR}/{kind}/{name}")
                yield f"{root.at(f'{kind}/{name}/{METADATA}')} is missing; restore it, or remove {receipts} too"


def _stray_files(root: Root, layout: GroupLayout) -> Iterator[str]:
    """What lies among shards and receipts and belongs to none of the planned units."""
    units = range(layout.store.n_units)
    try:
        receipts = root.children(f"{RECEIPTS_DIR}/{layout.path}")
    except StoreError:
        return  # a server that cannot list
    expected = {layout.receipt_key(unit).rsplit("/", 1)[-1] for unit in units} | {"metadata.json"}
    for name in receipts:
        if name not in expected and not name.startswith("."):
            yield f"{root.at(f'{RECEIPTS_DIR}/{layout.path}/{name}')} is no unit's receipt"
    for array in layout.arrays:
        planned = {str(unit) for unit in units}
        for name in root.children(f"{layout.path}/{array.name}/c"):
            if name not in planned:
                yield f"{root.at(f'{layout.path}/{array.name}/c/{name}')} is no shard of the store's {len(units)} units"


@contextlib.contextmanager
def _opened(root: Root, key: str, *, whole: bool) -> Iterator[Read]:
    """Reads of a file; one of an object store is fetched at once when it is wanted `whole`."""
    if root.path is not None:
        with root.open(key) as file:
            yield lambda start, stop: os.pread(file.fileno(), stop - start, start)
    elif whole:
        with root.open(key) as held:
            data = held.read()
        yield lambda start, stop: data[start:stop]
    else:
        yield lambda start, stop: bytes(root.ranges(key, [start], [stop])[0]) if stop else b""  # type: ignore[attr-defined]


def _index_faults(array: ArrayLayout, unit: int, receipt: Receipt, index: np.ndarray, where: str) -> list[str]:
    """Rows that the shard's index calls present and the receipt failed, or the other way round."""
    rows = array.store.unit_rows(unit)
    failed = {failure.row for failure in receipt.failed}
    n_views = array.store.n_views
    faults = []
    for slot, there in enumerate((index[:, 0] != EMPTY).tolist()):
        row, view = rows.start + slot // n_views, slot % n_views
        wanted = row < rows.stop and row not in failed
        if there != wanted:
            state = "is empty and its receipt says it was written" if wanted else "is there and should be empty"
            faults.append(f"shard {where}, row {row}, view {view} {state}")
    return _shortened(faults, where)


def _chunk_faults(
    array: ArrayLayout, unit: int, receipt: Receipt, index: np.ndarray, read: Read, where: str
) -> list[str]:
    """Rows whose bytes are not those of the receipt or of the checksum beside them, or whose numbers are none."""
    record = receipt.shard(array.name)
    assert record is not None
    crcs = record.crcs()
    rows = array.store.unit_rows(unit)
    damaged, not_finite = [], []
    for slot in np.flatnonzero(index[:, 0] != EMPTY).tolist():
        start = int(index[slot, 0])
        stored = memoryview(read(start, start + array.stored_bytes))
        chunk, beside = stored[: array.chunk_bytes], stored[array.chunk_bytes :]
        row, n_view = rows.start + slot // array.store.n_views, slot % array.store.n_views
        crc = crc32c(chunk)
        if crc != crcs[slot]:
            damaged.append(f"shard {where}, row {row}, view {n_view}: wrong checksum, the bytes are damaged")
        elif int.from_bytes(beside, "little") != crc:
            damaged.append(f"shard {where}, row {row}, view {n_view}: the checksum stored beside the bytes is damaged")
        elif not _finite(np.frombuffer(chunk, dtype=array.dtype)):
            not_finite.append(f"shard {where}, row {row}, view {n_view}: NaN or infinity among its numbers")
    return _shortened(damaged, where) + _shortened(not_finite, where)


def _covered(index: np.ndarray) -> np.ndarray:
    return np.unique(index[index[:, 0] != EMPTY, 0])


def _finite(values: np.ndarray) -> bool:
    if values.dtype == np.float16:  # by its exponent bits: numpy's isfinite converts every half
        return not bool(((values.view(np.uint16) & 0x7C00) == 0x7C00).any())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _shortened(faults: list[str], where: str) -> list[str]:
    if len(faults) <= FAULTS_A_SHARD:
        return faults
    return [*faults[:FAULTS_A_SHARD], f"shard {where}: {len(faults) - FAULTS_A_SHARD} more rows like these"]
