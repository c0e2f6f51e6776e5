"""`python -m pipeline status STORE`: how far a store is and how fast it gets on, from any shell, running or not.

Everything is read from the receipts, so it is right whoever runs and wherever; only the lock of a run is the machine's
(or, on a network file system with locks, the network's). Cost: a small file a unit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from storage import Store, open_store
from storage.base.errors import StoreError
from storage.base.shown import counted
from storage.receipts import Failure, scan
from storage.staging import living_runs

RECENT_S = 600.0
SHOWN = 5  # failures


def status(where: str) -> Iterator[str]:
    """Lines for the terminal. Raises StoreError when there is no store."""
    store = open_store(where)
    units = f"{counted(store.layout.n_units, 'unit')} of {store.layout.shard_rows} rows"
    yield f"{store.root}: {counted(store.n_rows, 'image')}, {units}"
    runs = living_runs(store.root)
    if store.root.path is None:
        yield "whether a run is at work is not known of a remote store; the rates below tell"
    else:
        yield f"at work now: {', '.join(runs)}" if runs else "no run is at work on this store"
    for path in store.groups():
        yield from group_status(store, path, time.time())


def group_status(store: Store, path: str, now_unix_s: float) -> Iterator[str]:
    """Units and images done, the rate of the last minutes, what is left at that rate, failures."""
    try:
        layout, attributes = store.group_layout(path)
    except StoreError as error:
        yield f"{path}: {error}"
        return
    n_done = n_images = 0
    failures: list[Failure] = []
    finished: list[tuple[float, int]] = []  # (when, images)
    for unit, receipt, reason in scan(store.root, layout, attributes["identity_digest"]):
        if receipt is None or reason is not None:
            continue
        n_rows = len(layout.store.unit_rows(unit))
        n_done += 1
        n_images += n_rows
        failures += receipt.failed
        at_s = receipt.made.get("finished_unix_s", 0.0)
        if at_s > now_unix_s - RECENT_S:
            finished.append((at_s, n_rows))
    missing = layout.store.n_units - n_done
    line = f"{path}  units {n_done} done, {missing} missing  images {n_images}  failed {len(failures)}"
    images_per_s = rate(finished)
    if images_per_s:
        line += f"  {images_per_s:.1f} images/s in the last {RECENT_S / 60:.0f} minutes"
        if missing:
            line += f", {(store.n_rows - n_images) / images_per_s / 3600:.2g} hours for the rest"
    yield line
    yield from (f"  failed: row {f.row} {f.key}: {f.reason}" for f in failures[:SHOWN])
    if len(failures) > SHOWN:
        yield f"  … and {len(failures) - SHOWN} more"


def rate(finished: list[tuple[float, int]]) -> float:
    """Images/s from (when, images) of units: those after the first, over the time since it; 0 with fewer than two."""
    finished = sorted(finished)
    span_s = finished[-1][0] - finished[0][0] if finished else 0.0
    return sum(n for _, n in finished[1:]) / span_s if span_s else 0.0
