"""What a run's folder holds, and under which names; no other file of the trainer spells them but `.lock`'s own.

config.yaml                     the configuration, with what was chosen automatically written out
checkpoints/step-0000100/       weights, optimiser and state after 100 steps (`checkpoint.py`)
latest                          the name of the newest checkpoint
latent-statistics.safetensors   by which features are normalised that are latents (`latent_map.py`)
metrics.jsonl, tensorboard/     means over the log interval (`metrics.py`)
summary.json                    how the last command ended
train.log                       what training printed, where `ablate` started it
samples/step-0000100.png        grids of images drawn while training
samples-0000100-….{png,npz}     what `generate` drew, beside a folder of the same name
export-FORMAT/                  what `export` wrote
analysis/MEASURE.{json,svg}     what `probe` and `cknna` measured
evaluations.jsonl               what `evaluate --run` and `score` measured
report.html                     the page that `score` writes
.lock                           held by the process that writes here (`lock.py`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.base.files import write_atomic
from trainer.config.saved import SavedConfig, read_config, to_yaml
from trainer.config.schema import TrainConfig

CONFIG = "config.yaml"
BELOW = (f"*/{CONFIG}", f"*/*/{CONFIG}")  # runs/NAME, and runs/ablations/STUDY/NAME of `runs/*`
STEP = re.compile(r"step-\d{7,16}", re.ASCII)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run, whether or not anything lies there yet."""

    path: Path

    @property
    def config(self) -> Path:
        """The file that makes a folder a run."""
        return self.path / CONFIG

    @property
    def is_run(self) -> bool:
        """Whether a run began here."""
        return self.config.is_file()

    def read_config(self) -> SavedConfig:
        """The configuration. Raises UserError for one that this code cannot read, StoreError for a damaged file."""
        return read_config(self.config)

    def write_config(self, config: TrainConfig, earlier: Mapping[str, Any] | None = None) -> None:
        """Save the configuration, whole or not at all; `earlier` as for `to_save`."""
        write_atomic(self.config, to_yaml(config, earlier).encode(), "config")

    @property
    def latest(self) -> Path:
        """The file that names the newest checkpoint."""
        return self.path / "latest"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / _name(step)

    def checkpoint_folders(self) -> dict[int, Path]:
        """Step → folder of what bears a checkpoint's name, in the order of steps."""
        named = [path for path in self.checkpoints.glob("step-*") if STEP.fullmatch(path.name)]
        return dict(sorted((step_in_name(path), path) for path in named))

    @property
    def latent_statistics(self) -> Path:
        """The copy of the statistics of features as latents."""
        return self.path / "latent-statistics.safetensors"

    @property
    def metrics(self) -> Path:
        """The log: a line an interval."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        """How the last command that trained it ended."""
        return self.path / "summary.json"

    @property
    def log(self) -> Path:
        """What training printed, where an ablation started it."""
        return self.path / "train.log"

    def preview(self, step: int) -> Path:
        """The grid drawn while training, after `step` steps."""
        return self.path / "samples" / f"{_name(step)}.png"

    def drawn(self, name: str) -> Path:
        """The folder of images that `generate` calls `name`; their grid lies beside it."""
        return self.path / f"samples-{name}"

    def all_drawn(self) -> list[Path]:
        """The folders of images that `generate` named, whatever lies in them."""
        return sorted(path for path in self.path.glob("samples-*") if path.is_dir())

    def exported(self, to: str) -> Path:
        """The folder of an export, named after its format."""
        return self.path / f"export-{to}"

    def newest_picture(self) -> Path | None:
        """The newest grid that `generate` wrote, else the newest that training did."""
        drawn = sorted(
            (path for path in self.path.glob("samples-*.png") if path.is_file()), key=lambda path: path.stat().st_mtime
        )
        previews = sorted((self.path / "samples").glob("step-*.png"))
        return next(reversed(drawn or previews), None)

    def analysis(self, measure: str) -> Path:
        """What `probe` or `cknna` measured: a JSON file, and beside it a figure."""
        return self.path / "analysis" / f"{measure}.json"

    @property
    def evaluations(self) -> Path:
        """A line a measurement of `evaluate --run`."""
        return self.path / "evaluations.jsonl"

    @property
    def report(self) -> Path:
        """The page about this run alone."""
        return self.path / "report.html"


def runs_in(path: Path) -> list[Path]:
    """The run at `path`, else those up to two levels below it."""
    if RunFolder(path).is_run:
        return [path]
    return sorted(file.parent for pattern in BELOW for file in path.glob(pattern))


def step_in_name(checkpoint: Path) -> int:
    """Steps done at a checkpoint, as its name says."""
    return int(checkpoint.name.removeprefix("step-"))


def _name(step: int) -> str:
    return f"step-{step:07d}"
