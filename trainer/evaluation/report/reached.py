"""How long each run trained until its unguided FID was low enough, in epochs, where several checkpoints were scored.

The level is that of `quality/epochs.py`, 2, where a run reached it; else the lowest one that all of the runs reached
whose checkpoints were scored, so that they compare by how fast they got there. A run with one scored checkpoint says
nothing of when, and has no value. FIDs that were measured alike count (`alike.py`), by the way of most checkpoints;
what other ways say stands in the curves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from storage import StoreError, UserError, open_store
from trainer.evaluation.quality.epochs import TARGET, epochs_until
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.alike import Evaluated, evaluated
from trainer.evaluation.report.measures import spelled
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import NOTHING, Cell, number_cell

METRIC = "fid"
LEAST_SCORED = 2
EPOCHS = "Epochs until unguided FID"
EPOCHS_IN_WORDS = (
    "how often the run had seen its data set when images that were drawn without guidance first had an FID as low as "
    "this, of the checkpoints that were scored"
)


def epochs_column(records: Sequence[RunRecord]) -> tuple[str, list[Cell]] | None:
    """Heading and cells, one a run; None where no run has two scored checkpoints."""
    lines = _alike([_unguided(record) for record in records])
    scored = [_scored(of_run) for of_run in lines]
    best = [min(of_run.values()) for of_run in scored if len(of_run) >= LEAST_SCORED]
    if not best:
        return None
    level = TARGET if min(best) <= TARGET else max(math.ceil(100 * max(best) - 1e-9) / 100, max(best))
    cells = [_cell(*each, level) for each in zip(records, lines, scored, strict=True)]
    return f"{EPOCHS} {spelled(level)}", cells


def _unguided(record: RunRecord) -> list[Evaluation]:
    """The lines that count, as `epochs_until` decides."""
    # One epoch of one image, since only whether it is reached matters.
    return [line for line in record.evaluations if epochs_until([line], batch=1, n_images=1, fid=math.inf) is not None]


def _alike(of_runs: Sequence[Sequence[Evaluation]]) -> list[list[Evaluation]]:
    """Of each run, the lines that were measured as those of most runs and checkpoints."""
    ways: dict[tuple[Evaluated, int], set[tuple[int, int | None]]] = {}
    for i, lines in enumerate(of_runs):
        for line in lines:
            ways.setdefault(_way(line, i), set()).add((i, line.step))

    def weight(way: tuple[Evaluated, int]) -> tuple[int, int, int]:
        n_of_run = Counter(i for i, _ in ways[way])
        return sum(n >= LEAST_SCORED for n in n_of_run.values()), len(ways[way]), way[0].n_generated or 0

    chosen = max(ways, key=weight, default=None)
    return [[line for line in lines if _way(line, i) == chosen] for i, lines in enumerate(of_runs)]


def _way(line: Evaluation, run: int) -> tuple[Evaluated, int]:
    """How a line was measured; what does not say it all is alike to lines of its own run alone."""
    way = evaluated(line, METRIC)
    return way, run if way.not_known else -1


def _scored(lines: Sequence[Evaluation]) -> dict[int, float]:
    """Step → lowest FID that was measured of it."""
    found: dict[int, float] = {}
    for line in lines:
        if line.step is not None:
            found[line.step] = min(line.metrics[METRIC].value, found.get(line.step, math.inf))
    return found


def _cell(record: RunRecord, lines: Sequence[Evaluation], scored: dict[int, float], level: float) -> Cell:
    if len(scored) < LEAST_SCORED:
        return Cell(text=NOTHING)
    n_images = images_of(record)
    found = epochs_until(lines, batch=record.config.batch, n_images=n_images or 1, fid=level)
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
