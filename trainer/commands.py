"""The commands of `python -m trainer`: their options, and what they print. What a command does is imported by it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from storage.base.commands import Command
from storage.base.console import EXIT_FAILED, EXIT_OK
from storage.base.programs import program

if TYPE_CHECKING:
    from trainer.config.command_line import ImportCommand, TrainCommand
    from trainer.config.schema import TrainConfig
    from trainer.evaluation.options import (
        AnalyseConfig,
        EvaluateConfig,
        ExportConfig,
        GenerateConfig,
        MeasureConfig,
        NoConfig,
        ReportConfig,
    )

PROG = program("trainer")
OPTIONS = "trainer.evaluation.options"
COMMANDS = {
    "train": Command(
        "train a diffusion transformer from a feature store; run it again to resume",
        "trainer.config.command_line:TrainCommand",
        "trainer.commands:train",
    ),
    "alignments": Command(
        "the kinds of --loss.alignment, and their options", f"{OPTIONS}:NoConfig", "trainer.commands:alignments"
    ),
    "generate": Command(
        "draw images from a run's averaged weights: a folder of PNGs, or one .npz; run it again to go on",
        f"{OPTIONS}:GenerateConfig",
        "trainer.commands:generate",
    ),
    "evaluate": Command(
        "FID, sFID, Inception Score, precision and recall; or a Fréchet distance in another encoder's features",
        f"{OPTIONS}:EvaluateConfig",
        "trainer.commands:evaluate",
    ),
    "probe": Command(
        "linear probing of hidden states over blocks, times and checkpoints",
        f"{OPTIONS}:MeasureConfig",
        "trainer.commands:probe",
    ),
    "cknna": Command(
        "alignment of hidden states with a store's features", f"{OPTIONS}:MeasureConfig", "trainer.commands:cknna"
    ),
    "analyse": Command(
        "the paper's analysis figures, for any set of runs", f"{OPTIONS}:AnalyseConfig", "trainer.commands:analyse"
    ),
    "ablate": Command(
        "train the runs of an ablation file that are missing",
        "trainer.study.file:AblateConfig",
        "trainer.study.runs:ablate",
    ),
    "report": Command("one HTML page about any number of runs", f"{OPTIONS}:ReportConfig", "trainer.commands:report"),
    "export": Command(
        "a run for diffusers, or its averaged weights as one file", f"{OPTIONS}:ExportConfig", "trainer.commands:export"
    ),
    "import": Command(
        "make a run, to draw from or to train on, from a public checkpoint of REPA, iREPA, REG, LightningDiT, SiT, DiT",
        "trainer.config.command_line:ImportCommand",
        "trainer.commands:import_run",
    ),
}


def train(command: TrainCommand) -> int:
    """Train or resume; what came of it goes to stdout, from the main rank."""
    from trainer.config.command_line import train_config

    config = train_config(command.settings)  # before torch is loaded, which takes longer than an error
    config.require_store()
    from trainer.loop.non_finite import NonFiniteError
    from trainer.loop.train import train
    from trainer.ranks.world import require_gpu_of_resident

    require_gpu_of_resident(config.device, config.data.resident)
    try:
        summary = train(config, given=command.given, accept_changes=command.resume_with_changes)
    except NonFiniteError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if os.environ.get("RANK", "0") == "0":
        from trainer.run.summary import outcome

        print(json.dumps(summary, indent=1) if command.json else outcome(summary))
        run = shlex.quote(summary["run"])
        print(f"next: {PROG} generate {run} --n 64   ·   tensorboard --logdir {run}")
    return EXIT_OK


def alignments(config: NoConfig) -> None:
    """Print every kind, and its options."""
    from trainer.alignment import described

    print("\n".join(described()))


def import_run(command: ImportCommand) -> None:
    """Make a run of a public checkpoint."""
    from trainer.config.command_line import train_config
    from trainer.run.folder import RunFolder
    from trainer.run.published import starting_point
    from trainer.run.releases import import_checkpoint, shapes_of

    settings = command.settings
    base: TrainConfig | None = None
    if settings.get("config") is None:
        shapes = shapes_of(command.file, command.release)
        base = starting_point(command.release, shapes, command.file, settings.get("preset") or "")
    config = train_config(settings, base=base)
    print("\n".join(import_checkpoint(command.file, command.release, config)))
    run, saved = (shlex.quote(str(path)) for path in (config.run, RunFolder(config.run).config))
    print(f"next: {PROG} generate {run} --n 64   ·   {PROG} train --config {saved}")


def generate(config: GenerateConfig) -> None:
    """Draw images."""
    from trainer.evaluation.generate.generate import generate

    _print_paths(generate(config))


def evaluate(config: EvaluateConfig) -> None:
    """Measure images against a reference."""
    from trainer.evaluation.quality.evaluate import Description, evaluate, table

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    described = {field.name: values.pop(field.name) for field in dataclasses.fields(Description)}
    print(table(evaluate(values.pop("images"), values.pop("reference"), Description(**described), **values)))


def probe(config: MeasureConfig) -> None:
    """Measure one run by linear probing."""
    from trainer.evaluation.probing.analyse import write_measure

    _print_paths(write_measure(config.run, config, "probe", config.out))


def cknna(config: MeasureConfig) -> None:
    """Measure one run by CKNNA."""
    from trainer.evaluation.probing.analyse import write_measure

    _print_paths(write_measure(config.run, config, "cknna", config.out))


def analyse(config: AnalyseConfig) -> None:
    """Draw the paper's figures."""
    from trainer.evaluation.probing.analyse import write_analysis

    _print_paths(write_analysis(config.runs, config, config.out))


def report(config: ReportConfig) -> None:
    """Write the page."""
    from trainer.evaluation.report.page import write_report

    _print_paths(write_report(config.runs, config.out, config.title))


def export(config: ExportConfig) -> None:
    """Write weights for other programs."""
    from trainer.evaluation.export.export import export

    _print_paths(export(config.run, config.to, config.out, config.checkpoint))


def _print_paths(written: Iterable[Path]) -> None:
    for path in written:
        print(path)
