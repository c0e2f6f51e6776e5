"""What was measured of a run: RUN/evaluations.jsonl, a line a measurement."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.base.boundary import Count, Number, read_lines
from storage.base.files import append_line
from trainer.evaluation.quality.card import Card
from trainer.run.folder import RunFolder
from trainer.run.metrics import parsed

NAMED = 10  # images that could not be read, in a run's record; the result has them all


def record(run: Path, step: int | None, result: dict[str, Any]) -> None:
    """Add a result to a run's record, with no more names of what could not be read than a person looks at."""
    few = {name: _few_named(result[name]) for name in ("generated", "reference")}
    append_line(RunFolder(run).evaluations, json.dumps({"step": step, **result, **few}))


def _few_named(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "failed": record["failed"][:NAMED]} if record.get("failed") else record


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A value and the counts it was made from, as far as they are known; `interval` is low and high."""

    value: Number
    n_generated: Count | None = None
    n_reference: Count | None = None
    k: Count | None = None
    interval: tuple[Number, Number] | None = None
    deviation: Number | None = None


@dataclass(frozen=True, kw_only=True)
class ImagesRecord:
    """Which images, as far as it is known; `digest` is of their pixels."""

    kind: str | None = None
    path: str | None = None
    digest: str | None = None
    resolution: Count | None = None
    n: Count | None = None
    n_failed: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of a run's record: what was measured of which step, by which encoder; `card` is its protocol."""

    name: str
    metrics: dict[str, Metric]
    step: Count | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    generated: ImagesRecord = field(default_factory=ImagesRecord)
    reference: ImagesRecord = field(default_factory=ImagesRecord)
    asked: dict[str, Any] = field(default_factory=dict)  # the reference and the number of its images, as asked for
    card: Card = field(default_factory=Card)  # of a line from before there were cards, nothing is known


def read_record(run: Path) -> list[Evaluation]:
    """What was measured of a run, oldest first; a last line that a crash cut short is left out.

    Raises StoreError, naming the line, for one that is damaged otherwise.
    """
    path = RunFolder(run).evaluations
    with contextlib.suppress(FileNotFoundError):
        return [parsed(Evaluation, f"{path} line {number}", line) for number, line in read_lines(path)]
    return []
