"""How long each run trained until its unguided FID was low enough, in epochs, where several checkpoints were scored.

The level is that of `quality/epochs.py`, 2, where a run reached it; else the lowest one that all of the runs reached
whose checkpoints were scored, so that they compare by how fast they got there. A run with one scored checkpoint says
nothing of when, and has no value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from storage import StoreError, UserError, open_store
from trainer.evaluation.quality.epochs import TARGET, epochs_until
from trainer.evaluation.report.measures import spelled
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import NOTHING, Cell, number_cell

LEAST_SCORED = 2
EPOCHS = "Epochs until unguided FID"
EPOCHS_IN_WORDS = (
    "how often the run had seen its data set when images that were drawn without guidance first had an FID as low as "
    "this, of the checkpoints that were scored"
)


def epochs_column(records: Sequence[RunRecord]) -> tuple[str, list[Cell]] | None:
    """Heading and cells, one a run; None where no run has two scored checkpoints."""
    scored = [_scored(record) for record in records]
    best = [min(of_run.values()) for of_run in scored if len(of_run) >= LEAST_SCORED]
    if not best:
        return None
    level = TARGET if min(best) <= TARGET else max(math.ceil(100 * max(best) - 1e-9) / 100, max(best))
    cells = [_cell(record, of_run, level) for record, of_run in zip(records, scored, strict=True)]
    return f"{EPOCHS} {spelled(level)}", cells


def _scored(record: RunRecord) -> dict[int, float]:
    """Step → lowest unguided FID that was measured of it."""
    found: dict[int, float] = {}
    for line in record.evaluations:
        # One epoch of one image: `epochs_until` decides which lines count, and says their steps.
        reached = epochs_until([line], batch=1, n_images=1, fid=math.inf)
        if reached is not None:
            found[reached.step] = min(reached.fid, found.get(reached.step, math.inf))
    return found


def _cell(record: RunRecord, scored: dict[int, float], level: float) -> Cell:
    if len(scored) < LEAST_SCORED:
        return Cell(text=NOTHING)
    n_images = images_of(record)
    found = epochs_until(record.evaluations, batch=record.config.batch, n_images=n_images or 1, fid=level)
    if found is None:
        step = min(scored, key=lambda step: scored[step])
        return Cell(text="not reached", note=f"at best {spelled(scored[step])}, after {step:,} steps")
    note = f"FID {spelled(found.fid)} after {found.step:,} steps; {len(scored)} checkpoints scored"
    if not n_images:
        return Cell(text="number of images not known", note=note)
    return number_cell(found.epochs, ",.0f" if found.epochs >= 100 else ".3g", note=note)


def images_of(record: RunRecord) -> int | None:
    """Images of a run's data set: as its summary says, else the rows of its store; None where neither tells."""
    if record.summary.samples:
        return record.summary.samples
    with suppress(StoreError, UserError, OSError):
        return open_store(record.config.store).n_rows
    return None
