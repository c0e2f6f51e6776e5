"""How images are described: by `python -m pipeline features`, in a process of its own.

The trainer loads no encoder. What is made here is that command's line, whose output is a feature file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from storage.base.choices import INCEPTION
from trainer.evaluation.quality.precision_recall import NEIGHBOURS

STDERR = 2  # its number, which another process takes whatever `sys.stderr` is here
Set = tuple[Path | str, Path, int]  # images, feature file, at most so many


@dataclass(frozen=True, kw_only=True)
class Description:
    """How images are described: the options of `python -m pipeline features`."""

    encoder: str
    weights: Path | None = None
    token: str = "cls"
    resolution: int = 0
    device: str = "auto"
    max_failures: float = 0.001

    @property
    def label(self) -> str:
        """As `FeatureFile.label`."""
        return f"{self.encoder}-mean" if self.token == "mean" and self.encoder != INCEPTION else self.encoder

    def describe(self, sets: Sequence[Set], like: Path | None, *, check: bool = False) -> None:
        """Run the command on sets of images, to be comparable with the file `like`.

        With `check` it only looks whether it can. Ends with its status when it fails, having said why itself. What it
        prints goes to standard error, since standard output may be JSON.
        """
        status = subprocess.run(self.command(sets, like, check=check), stdout=STDERR).returncode
        if status:
            sys.exit(status)

    def command(
        self, sets: Sequence[Set], like: Path | None, *, check: bool = False, at_least: int = NEIGHBOURS + 1
    ) -> list[str]:
        """The command's line, which refuses sets of fewer than `at_least` images.

        Raises ModuleNotFoundError for a package that it lacks: the other command has other extras in mind.
        """
        needed = "torch_fidelity" if self.encoder == INCEPTION else "timm"
        if find_spec(needed) is None:
            raise ModuleNotFoundError(name=needed)
        places, outs, limits = zip(*sets, strict=True)
        command = [sys.executable, "-m", "pipeline", "features", *map(_argument, places)]
        command += ["--out", *map(_argument, outs), "--n", *map(str, limits)]
        command += [f"--encoder={self.encoder}", f"--token={self.token}", f"--device={self.device}"]
        command += [f"--resolution={self.resolution}", f"--max-failures={self.max_failures}"]
        command += [f"--at-least={at_least}", "--no-next"]
        if self.weights is not None:
            command += [f"--weights={self.weights}"]
        if like is not None:
            command += [f"--like={like}"]
        return [*command, "--check"] if check else command


def _argument(value: Path | str) -> str:
    """A path that argparse does not take for an option."""
    return f"./{value}" if str(value).startswith("-") else str(value)
