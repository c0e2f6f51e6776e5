"""`python -m storage statistics`: sums of a group's numbers, counted from its shards where its receipts have none.

Groups that were imported before imports counted have none, and derived ones none of their patch tokens. The receipt of
such a unit is written again with the sums that encoding would have recorded, and is otherwise as it was; no shard and
no identity changes. Units that have sums are left alone, so a recount that was killed goes on.

Cost: every byte of what is counted is read once, its checksums with it. Memory: one unit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import places
from storage.base.console import progress_bar, say
from storage.base.ending import command, say_next
from storage.base.errors import StoreError, UserError
from storage.base.options import argument, option
from storage.base.shown import counted
from storage.codecs import TOKENS
from storage.identity import FeaturesIdentity
from storage.reader import DEFAULT_THREADS, GroupReader, Store, open_store
from storage.receipts import Receipt, read_receipt, scan, write_receipt
from storage.roots import Root
from storage.staging import Staging
from storage.statistics import describe, group_sums, unit_sums


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """`statistics`: of which group."""

    store: str = argument("store root or URL")
    group: str = argument("group to count: latents/NAME or features/NAME")
    places: bool = option(
        False, "features: mean and variance at each place of the grid as well, which latents of features need"
    )


def statistics(config: StatisticsConfig) -> None:
    """Count what is missing and print what the group holds. Raises StoreError when the group is not complete."""
    store = open_store(config.store)
    group = store.group(config.group)
    try:
        names = [array.name for array in group.layout.arrays]
        wanted = {name for name in names if name == TOKENS or name not in group.codec_arrays}
        lacking = [
            (unit, receipt)
            for unit, receipt, _ in scan(store.root, group.layout, group.identity_digest)
            if receipt is not None and receipt.n_done and not wanted <= receipt.statistics.keys()
        ]
        if lacking:
            with (
                Staging(store.root) as staging,
                progress_bar(len(lacking), unit="shard", description=f"count {group.path}") as bar,
            ):
                for unit, receipt in lacking:
                    count_unit(store.root, group, unit, receipt, staging.run_id)
                    bar.update(1)
        sums, _ = group_sums(store.root, group.layout, group.identity_digest, group.identity)
        n_units = counted(store.layout.n_units, "unit")
        done = f"{len(lacking)} of {n_units} counted" if lacking else f"{n_units}, all counted before"
        say(f"{store.root.at(group.path)}: {done}")
        say(*describe(sums, group.identity))
        if config.places:
            say(_of_places(store, group))
        say_next(command("storage", "info", f"{config.store.rstrip('/')}/{group.path}"))
    finally:
        group.close()


def _of_places(store: Store, group: GroupReader[Any]) -> str:
    """Count what each place holds, unless that was done of these rows; returns what there is to say."""
    if not isinstance(group.identity, FeaturesIdentity):
        raise UserError(f"--places is of features, and {group.path} are latents; leave it out")
    try:
        statistics = places.read(store.root, group)
    except StoreError:  # of other rows, or damaged
        statistics = None
    state = "are there"
    if statistics is None:
        with (
            Staging(store.root) as staging,
            progress_bar(store.layout.n_units, unit="shard", description=f"places of {group.path}") as bar,
        ):
            statistics = places.count(group, DEFAULT_THREADS, bar.update)
            places.publish(store.root, group, statistics, staging.run_id)
        state = "were counted"
    low, high = np.sqrt(statistics.var).min(), np.sqrt(statistics.var).max()
    of_class = "" if statistics.mean_class is None else ", and of class tokens"
    return f"statistics of {statistics.mean[0].size} places {state}: std {low:.4g} to {high:.4g}{of_class}"


def count_unit(root: Root, group: GroupReader[Any], unit: int, receipt: Receipt, run_id: str) -> None:
    """Write the unit's receipt again, with its sums, unless the unit was published anew meanwhile."""
    rows = group.layout.store.unit_rows(unit)
    failed = {failure.row for failure in receipt.failed}
    present = np.array([row - rows.start for row in rows if row not in failed], dtype=np.int64)
    views = np.arange(group.layout.store.n_views)
    flat = group.gather(np.repeat(present + rows.start, len(views)), np.tile(views, len(present)))
    arrays = {name: array.reshape(len(present), len(views), *array.shape[1:]) for name, array in flat.items()}
    if failed:  # `unit_sums` takes rows by their places in the unit
        whole = {name: np.zeros((len(rows), *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        for name, array in arrays.items():
            whole[name][present] = array
        arrays = whole
    counted = unit_sums(group.layout, arrays, present, group.codec, rows.start)
    sums = {name: of.packed() for name, of in counted.items()}
    if read_receipt(root, group.layout, unit) == receipt:
        write_receipt(root, group.layout, dataclasses.replace(receipt, statistics=sums), run_id)
