"""What is measured of one run at one step, by the commands that a user types; one JSON file a measure, made once.

MEASURES is a folder of small files, which may be kept where no run is.

MEASURES/RUN/STEP/heldout_loss.json   denoising loss of held-out images, by t
MEASURES/RUN/STEP/trained_loss.json   the same of as many training images, where images are drawn
MEASURES/RUN/STEP/probe.json          linear probe of every block at t = 0.5, on the training images
MEASURES/RUN/STEP/cknna.json          alignment of every block with the features, on the held-out images
MEASURES/RUN/STEP/NAME.json           Fréchet distance, precision, recall in an encoder's features, of the first
                                      images of the run at this step
MEASURES/RUN/STEP/samples.jpg         the first 64 of them, for a look
MEASURES/RUN/machine.txt              on what it was measured, a line a machine
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from benchmarks.effect.arms import COMMON, SAMPLING
from storage import open_store

MACHINES = "machine.txt"
ALIGNED_EYES, OTHER_EYES = "aligned-encoder", "other-encoder"
Command = Callable[[Sequence[str]], None]  # runs a module with arguments, raises where it fails


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all measurements of a study share."""

    out: Path
    train_store: Path
    heldout_store: Path
    features: str  # the group that CKNNA compares with
    encoder: str  # as `python -m pipeline features` takes it
    encoder_weights: Path | None
    second_weights: Path | None
    n_images: int
    common: Mapping[str, str] = field(default_factory=lambda: COMMON)  # options of every run of benchmarks.repa_effect
    sampling: Mapping[str, str] = field(default_factory=lambda: SAMPLING)
    measures: Path  # what is there is not measured again, nor trained for

    def folder(self, run: str, step: int) -> Path:
        """Where the measures of a run at a step lie."""
        return self.measures / run / f"{step:07d}"

    def reference(self, name: str) -> Path:
        """The feature file of the training images."""
        return self.out / f"reference-{name}.npz"


def write_references(setting: Setting, command: Command) -> None:
    """Describe the training images by both encoders, once."""
    if not setting.reference(ALIGNED_EYES).is_file():
        command([*_describe(setting, setting.train_store, setting.reference(ALIGNED_EYES))])
    if setting.second_weights is not None and not setting.reference(OTHER_EYES).is_file():
        command([*_describe_otherwise(setting, setting.train_store, setting.reference(OTHER_EYES))])


def is_measured(setting: Setting, run: str, step: int, *, draws: bool) -> bool:
    """Whether everything of a run at a step is there."""
    names = ["heldout_loss", "probe", "cknna"]
    if draws:
        names += [ALIGNED_EYES, OTHER_EYES] if setting.second_weights is not None else [ALIGNED_EYES]
    return all((setting.folder(run, step) / f"{name}.json").is_file() for name in names)


def measure(setting: Setting, run: Path, step: int, command: Command, *, draws: bool) -> None:
    """Everything of one run at one step that is missing; `draws`: images and their distances as well."""
    folder = setting.folder(run.name, step)
    folder.mkdir(parents=True, exist_ok=True)
    note_machine(setting, run.name)
    losses = {"heldout_loss": setting.heldout_store, **({"trained_loss": setting.train_store} if draws else {})}
    for name, store in losses.items():
        if not (folder / f"{name}.json").is_file():
            n = open_store(setting.heldout_store).n_rows
            command(
                ["benchmarks.effect.heldout_loss", str(run), "--store", str(store), "--step", str(step), "--n", str(n),
                 "--out", str(folder / f"{name}.json")]
            )  # fmt: skip
    for name, store in (("probe", setting.train_store), ("cknna", setting.heldout_store)):
        if not (folder / f"{name}.json").is_file():
            command(
                ["trainer", name, str(run), "--store", str(store), "--features", setting.features,
                 "--checkpoints", str(step), "--out", str(folder / name)]
            )  # fmt: skip
            (folder / f"{name}.svg").unlink(missing_ok=True)
    if draws:
        distances(setting, run, step, folder, command)


def note_machine(setting: Setting, run: str) -> None:
    """Add this machine to those that a run was measured on."""
    _note(setting, run, [machine_in_short()])


def note_machines_of(setting: Setting, run: str, other: str) -> None:
    """Add the machines that another run was measured on, whose measures are this run's too."""
    file = setting.measures / other / MACHINES
    _note(setting, run, file.read_text().splitlines() if file.is_file() else [])


def _note(setting: Setting, run: str, lines: Sequence[str]) -> None:
    file = setting.measures / run / MACHINES
    known = file.read_text().splitlines() if file.is_file() else []
    if new := [line for line in lines if line not in known]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*known, *new]) + "\n")


def machine_in_short() -> str:
    """What results may depend on: the GPU, or the processor, and the libraries that compute."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        device = cpu[1] if cpu else platform.processor()
    return f"{device}; torch {torch.__version__.partition('+')[0]}, numpy {version('numpy')}"


def machines(measures: Path, runs: Iterable[str]) -> list[str]:
    """A line a machine, with the runs that were measured on it; of those that did not note it nothing is said."""
    of: dict[str, list[str]] = {}
    for run in runs:
        file = measures / run / MACHINES
        for line in file.read_text().splitlines() if file.is_file() else []:
            of.setdefault(line, []).append(run)
    return [f"{line}: {', '.join(of[line])}." for line in of]


def distances(setting: Setting, run: Path, step: int, folder: Path, command: Command) -> None:
    """Draw images, describe them, compare, and remove them."""
    if not missing_distances(setting, folder):
        return
    images = folder / "samples"
    options = [f"--{name}={value}" for name, value in setting.sampling.items()]
    command(
        ["trainer", "generate", str(run), "--n", str(setting.n_images), "--checkpoint", str(step),
         "--out", str(images), *options]
    )  # fmt: skip
    picture = images.with_suffix(".png")
    with Image.open(picture, formats=["PNG"]) as grid:
        grid.save(images.with_suffix(".jpg"), quality=80)
    picture.unlink()
    compare(setting, images, folder, command, ["--run", str(run), "--step", str(step)])


def missing_distances(setting: Setting, folder: Path) -> list[str]:
    """Which of the distances are not in a folder."""
    eyes = [ALIGNED_EYES, *([OTHER_EYES] if setting.second_weights is not None else [])]
    return [name for name in eyes if not (folder / f"{name}.json").is_file()]


def compare(setting: Setting, images: Path, folder: Path, command: Command, of_run: Sequence[str] = ()) -> None:
    """Describe images below `folder` by the encoders whose distances are missing there, compare, and remove them."""
    for name in missing_distances(setting, folder):
        described, compared = folder / f"{name}.npz", folder / f"{name}-evaluation"
        describe = _describe if name == ALIGNED_EYES else _describe_otherwise
        command(describe(setting, images, described))
        reference = str(setting.reference(name))
        command(["trainer", "evaluate", str(described), "--reference", reference, "--out", str(compared), *of_run])
        result = next(compared.glob("*.json"))
        result.rename(folder / f"{name}.json")
        shutil.rmtree(compared)
        described.unlink()
    shutil.rmtree(images)


def _describe(setting: Setting, images: Path, out: Path) -> list[str]:
    weights = ["--weights", str(setting.encoder_weights)] if setting.encoder_weights else []
    return [
        "pipeline", "features", str(images), "--encoder", setting.encoder, "--token", "mean", "--out", str(out),
        *weights,
    ]  # fmt: skip


def _describe_otherwise(setting: Setting, images: Path, out: Path) -> list[str]:
    return [
        "benchmarks.effect.second_encoder", str(images), "--weights", str(setting.second_weights), "--out", str(out)
    ]  # fmt: skip
