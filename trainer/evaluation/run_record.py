"""What a run left behind, read without a model, a device or its store: settings, curves, measurements, pictures.

Hours are those of the log: each line's share of the steps over its images a second, times its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UserError
from trainer.checkpoint import latest_checkpoint, read_state
from trainer.config import TrainConfig
from trainer.config_tree import flatten, free_fields, from_yaml
from trainer.evaluation.evaluate import read_record
from trainer.metrics import read_metrics

ALWAYS_COMPARED = ("preset", "steps", "store")  # free to change on resume, and part of what a run is
BELOW = ("*/config.yaml", "*/*/config.yaml")  # runs/NAME, and runs/ablations/STUDY/NAME of `runs/*`
MEASURES = ("probe", "cknna")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. `points` holds what `probe` and `cknna` measured, and `n_samples` on how many samples; `evaluations` the
    lines of `evaluate --run`.

    `compared_with` is the path of the features that CKNNA compares with; empty where it was not measured.
    """

    name: str
    path: Path
    config: TrainConfig
    lines: list[dict[str, Any]]
    device: str
    checkpoint_step: int
    identities: dict[str, str]
    points: dict[str, list[dict[str, Any]]]
    n_samples: dict[str, int]
    compared_with: str
    evaluations: list[dict[str, Any]]
    picture: Path | None

    @property
    def steps(self) -> int:
        """Steps done, as far as the log or a checkpoint tells."""
        return max(self.lines[-1]["step"] if self.lines else 0, self.checkpoint_step)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted settings that make the run what it is."""
        free = free_fields(self.config) - set(ALWAYS_COMPARED)
        return {n: v for n, v in flatten(self.config).items() if n not in free or n.startswith("sample.")}

    @property
    def hours(self) -> float | None:
        """Hours of all its devices together; None before the first line."""
        seconds, before = 0.0, 0
        for line in self.lines:
            if line["images_per_s"]:
                images = (line["step"] - before) * self.config.batch
                seconds += images / line["images_per_s"] * line.get("ranks", 1)
            before = line["step"]
        return seconds / 3600 if self.lines else None

    @property
    def images_per_s(self) -> float | None:
        """Median over the log's lines."""
        rates = sorted(line["images_per_s"] for line in self.lines)
        return rates[len(rates) // 2] if rates else None

    def newest(self, measure: str) -> list[dict[str, Any]]:
        """The points of the newest step."""
        points = self.points.get(measure, [])
        newest = max((point["step"] for point in points), default=0)
        return [point for point in points if point["step"] == newest]

    def best(self, measure: str, times: Collection[float] = ()) -> dict[str, Any] | None:
        """The point of the newest step at which the measure is largest, at one of the times if any are given."""
        points = [point for point in self.newest(measure) if not times or point["t"] in times]
        return max(points, key=lambda point: point[measure], default=None)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs among the paths and up to two levels below them, each once. Raises UserError where there is none."""
    found: list[Path] = []
    for path in paths:
        below = sorted(child.parent for pattern in BELOW for child in path.glob(pattern))
        runs = [path] if (path / "config.yaml").is_file() else below
        if not runs:
            raise UserError(f"{path} is not a run and holds none (no config.yaml); name what `make train RUN=…` wrote")
        found += [run for run in runs if run not in found]
    return found


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
    measured = {measure: read_measure(run, measure) for measure in MEASURES}
    return RunRecord(
        name=name,
        path=run,
        config=from_yaml(run / "config.yaml"),
        lines=[line for line in read_metrics(run) if line.get("images_per_s")],
        device=str(_json(run / "summary.json").get("device", "")),
        checkpoint_step=state.step if state is not None else 0,
        identities=state.identities if state is not None else {},
        points={measure: found.get("points", []) for measure, found in measured.items()},
        n_samples={measure: found["n"] for measure, found in measured.items() if "n" in found},
        compared_with=measured["cknna"].get("features", {}).get("path", "").removeprefix("features/"),
        evaluations=read_record(run),
        picture=_picture(run),
    )


def read_measure(run: Path, measure: str) -> dict[str, Any]:
    """What was written of a measure beside the run; nothing when it was not. Raises UserError when it is damaged."""
    return _json(run / "analysis" / f"{measure}.json")


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing when it is not there. Raises UserError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and run the command that wrote it again") from error


def _picture(run: Path) -> Path | None:
    """The newest grid that `generate` wrote, else the newest that training did."""
    drawn = sorted(run.glob("samples-*.png"), key=lambda path: path.stat().st_mtime)
    previews = sorted((run / "samples").glob("step-*.png"))
    return next(reversed(drawn or previews), None)
