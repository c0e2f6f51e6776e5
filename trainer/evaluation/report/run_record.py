"""What a run left behind, read without a model, a device or its store: settings, curves, measurements, pictures.

Times are those of the log: each line's share of the images over its images a second; device time is that times ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from storage.base.boundary import Count, parse_json, read_regular
from storage.base.errors import UserError
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, free_fields
from trainer.evaluation.generate.image_files import Drawn, sets_drawn
from trainer.evaluation.probing.measured import MEASURES, Measured, read_measured
from trainer.evaluation.quality.record import Evaluation, read_record
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder, runs_in
from trainer.run.metrics import Logged, read_logged

ALWAYS_COMPARED = ("preset", "steps", "store")  # free to change on resume, and part of what a run is


@dataclass(frozen=True)
class Summary:
    """What `summary.json` says of how the run was trained; a field that it does not have is not known."""

    device: str = ""
    parameters: Count | None = None
    classes: Count | None = None
    samples: Count | None = None  # of the data set, that were trained on
    version: str | None = None
    commit: str | None = None
    machine: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has taken up to a step: images seen, seconds on the clock, seconds of all devices together."""

    step: float
    images: float
    seconds: float
    device_seconds: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. `measured` holds what `probe` and `cknna` wrote, `evaluations` the lines of `evaluate --run`.

    `distances` are the log's lines of `--log.distance-every`.
    """

    name: str
    path: Path
    config: TrainConfig
    lines: list[Logged]
    checkpoint_step: int
    identities: dict[str, str]
    measured: dict[str, Measured | None]
    evaluations: list[Evaluation]
    picture: Path | None
    drawn: list[Drawn] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    distances: list[Logged] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done, as far as the log or a checkpoint tells."""
        return max(self.lines[-1].step if self.lines else 0, self.checkpoint_step)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted settings that make the run what it is; a class token's guidance as what it comes to."""
        free = free_fields(self.config) - set(ALWAYS_COMPARED)
        flat = flatten(self.config) | {"sample.guidance_class": self.config.class_guidance}
        return {n: v for n, v in flat.items() if n not in free or n.startswith("sample.")}

    @property
    def on_gpu(self) -> bool | None:
        """Whether it was trained on a GPU; None where nothing says so."""
        return None if not self.summary.device else self.summary.device != "cpu"

    @cached_property
    def spent(self) -> list[Spent]:
        """After every line of the log, from nothing at step 0."""
        so_far = [Spent(step=0, images=0, seconds=0.0, device_seconds=0.0)]
        for line in self.lines:
            before = so_far[-1]
            images = max(0.0, line.step - before.step) * self.config.batch
            seconds = images / line.images_per_s if line.images_per_s else 0.0
            so_far.append(
                Spent(
                    step=line.step,
                    images=before.images + images,
                    seconds=before.seconds + seconds,
                    device_seconds=before.device_seconds + seconds * line.ranks,
                )
            )
        return so_far

    def spent_at(self, step: float) -> Spent:
        """Up to any step: between lines of the log in proportion, beyond the last as far as the log knows."""
        after = bisect_left(self.spent, step, key=lambda spent: spent.step)
        if after == len(self.spent):
            last = self.spent[-1]
            return Spent(
                step=step,
                images=step * self.config.batch,
                seconds=last.seconds,
                device_seconds=last.device_seconds,
            )
        high = self.spent[after]
        low = self.spent[max(0, after - 1)]
        share = (step - low.step) / (high.step - low.step) if high.step > low.step else 1.0
        return Spent(
            step=step,
            images=low.images + share * (high.images - low.images),
            seconds=low.seconds + share * (high.seconds - low.seconds),
            device_seconds=low.device_seconds + share * (high.device_seconds - low.device_seconds),
        )

    @property
    def hours(self) -> float | None:
        """Hours of all its devices together; None before the first line."""
        return self.spent[-1].device_seconds / 3600 if self.lines else None

    @property
    def images_per_s(self) -> float | None:
        """Median over the log's lines."""
        rates = sorted(line.images_per_s for line in self.lines if line.images_per_s)
        return rates[len(rates) // 2] if rates else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs among the paths and up to two levels below them, each once. Raises UserError where there is none."""
    listed: list[Path] = []
    for path in paths:
        runs = runs_in(path)
        if not runs:
            raise UserError(f"{path} is not a run and holds none (no config.yaml); name what `make train RUN=…` wrote")
        listed += [run for run in runs if run not in listed]
    return listed


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read every run."""
    runs = find_runs(paths)
    return [_read(run, name) for run, name in zip(runs, names_of(runs), strict=True)]


def names_of(runs: Sequence[Path]) -> list[str]:
    """The names of their folders, with the parent's where two are alike."""
    names = [run.absolute().name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.absolute().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]


def _read(run: Path, name: str) -> RunRecord:
    checkpoint = latest_checkpoint(run)
    state = read_state(checkpoint) if checkpoint is not None else None
    logged = list(read_logged(run))
    return RunRecord(
        name=name,
        path=run,
        config=RunFolder(run).read_config().config,
        lines=[line for line in logged if line.images_per_s and line.images_per_s > 0],
        distances=[line for line in logged if line.frechet_distance is not None and line.distance_of is not None],
        checkpoint_step=state.step if state is not None else 0,
        identities=state.identities if state is not None else {},
        measured={measure: read_measured(run, measure) for measure in MEASURES},
        evaluations=read_record(run),
        picture=RunFolder(run).newest_picture(),
        drawn=sets_drawn(RunFolder(run).all_drawn()),
        summary=_summary(run),
    )


def _summary(run: Path) -> Summary:
    """How the run was trained, as its summary says. Raises StoreError when that is damaged."""
    path = RunFolder(run).summary
    try:
        return parse_json(Summary, read_regular(path), str(path), "remove it; training writes it again")
    except FileNotFoundError:
        return Summary()
