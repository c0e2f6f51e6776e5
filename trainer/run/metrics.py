"""What a run reports: `metrics.jsonl` always, TensorBoard beside it, Weights & Biases if asked for.

A line holds means over the log interval, not one step's luck. After a resume, lines beyond the checkpoint are dropped,
so each step is there once; the interval's sums are in the checkpoint, so a resumed curve equals an unbroken one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from storage.base.boundary import Count, Number, parse_json, read_lines
from storage.base.errors import UserError
from storage.base.files import write_atomic
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten
from trainer.run.folder import RunFolder

T = TypeVar("T")


class MetricsLog:
    """Appends lines and pictures; made on the main rank only."""

    def __init__(self, config: TrainConfig, *, from_step: int) -> None:
        run = config.run
        self._wandb: Any = _start_wandb(config) if config.log.wandb else None
        self._path = RunFolder(run).metrics
        kept = [line for line in read_metrics(run) if line["step"] <= from_step]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode(), "metrics")
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 — closed by close()
        self._writer: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(RunFolder(run).tensorboard), purge_step=from_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """One line; every number but the step is a scalar of TensorBoard and wandb too, a list one scalar an entry."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        scalars = _scalars(line)
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=line["step"])

    def picture(self, path: Path, pixels: Any, step: int) -> None:
        """A grid of samples, uint8 (H, W, 3), that was written to `path`."""
        if self._writer is not None:
            self._writer.add_image("samples", pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceOf:
    """What a Fréchet distance of the log is of; points of which all this is equal are a curve."""

    images: Count
    drawn: str  # how, in words
    extractor: str
    extractor_sha256: str
    width: Count  # of a feature vector
    reference_sha256: str  # of its features
    n_reference: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """Of a line, what is read again: by a resume the step, by the report the rest. Skipped steps have no loss.

    A Fréchet distance (`--log.distance-every`) has a line of its own.
    """

    step: Count
    denoising_loss: Number | None = None
    alignment_loss: Number | None = None
    images_per_s: Number | None = None
    ranks: Annotated[Count, Field(ge=1)] = 1
    frechet_distance: Number | None = None
    distance_of: DistanceOf | None = None


def read_logged(run: Path) -> Iterator[Logged]:
    """The lines written so far, one after another; a last line that a crash cut short is left out.

    Raises StoreError, naming the line, for one that is damaged otherwise.
    """
    return (parsed(Logged, *line) for line in _lines(run))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The same, whole lines."""
    lines = []
    for where, text in _lines(run):
        parsed(Logged, where, text)
        lines.append(parsed(dict[str, Any], where, text))
    return lines


def parsed(kind: type[T], where: str, text: bytes) -> T:
    """A line of a run's record as the type `kind`. Raises StoreError."""
    return parse_json(kind, text, where, "remove the line, or restore the file")


def _lines(run: Path) -> Iterator[tuple[str, bytes]]:
    """(file and number, text) of every line; none where there is no file."""
    path = RunFolder(run).metrics
    with contextlib.suppress(FileNotFoundError):
        for number, line in read_lines(path):
            yield f"{path} line {number}", line


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """`loss_by_time: [a, b]` becomes `loss_by_time/0` and `loss_by_time/1`; what is no number is left out."""
    entries = [
        (f"{name}/{i}", entry) if isinstance(value, list) else (name, entry)
        for name, value in line.items()
        for i, entry in enumerate(value if isinstance(value, list) else [value])
    ]
    return {name: value for name, value in entries if name != "step" and isinstance(value, int | float)}


def _start_wandb(config: TrainConfig) -> Any:
    """The wandb run of this run's folder, gone on with when it is there already. Raises UserError without wandb."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("--log.wandb needs the package wandb; pip install wandb, or leave the option out") from None
    identity = hashlib.sha256(str(config.run.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project=config.log.wandb,
        name=config.run.name,
        id=identity,
        resume="allow",
        dir=str(config.run),
        config=flatten(config),
    )
