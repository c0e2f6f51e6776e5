"""What `probe` and `cknna` wrote beside a run, read again.

A field that a file does not have was written by a version that did not record it: it is None, which is "not known".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from storage.base.boundary import Count, Number, parse_json, read_regular
from trainer.run.folder import RunFolder

MEASURES = ("probe", "cknna")
Time = Annotated[float, Field(ge=0, le=1)]
Block = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One block at one time t of one checkpoint."""

    step: Count
    t: Time
    block: Block
    probe: Number | None = None
    cknna: Number | None = None

    def value(self, measure: str) -> float | None:
        """What was measured; `measure` is one of MEASURES."""
        value: float | None = getattr(self, measure)
        return value


@dataclass(frozen=True, kw_only=True)
class MeasuredWith:
    """The features: path below the store, and digest of their identity."""

    path: str = ""
    identity_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A file of measurements; `by` is the command that wrote it, `rows` a digest of the samples."""

    points: list[Point] = field(default_factory=list)
    by: str = ""
    n: Count | None = None
    k: Count | None = None
    c: Number | None = None
    seed: int | None = None
    weights: str | None = None
    store: str | None = None
    rows: str | None = None
    depth: Block | None = None
    features: MeasuredWith = field(default_factory=MeasuredWith)

    def newest(self, measure: str) -> list[Point]:
        """The points of the newest step at which the measure was taken."""
        points = [point for point in self.points if point.value(measure) is not None]
        newest = max((point.step for point in points), default=0)
        return [point for point in points if point.step == newest]


def read_measured(run: Path, measure: str) -> Measured | None:
    """What was written of a measure beside the run; None when it was not. Raises StoreError when it is damaged."""
    path = RunFolder(run).analysis(measure)
    try:
        raw = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_json(Measured, raw, str(path), "remove it, and run the command that wrote it again")
