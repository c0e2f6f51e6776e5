"""The commands of `python -m trainer`: their options, and what they print. What a command does is imported by it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from storage.base.commands import Command
from storage.base.console import EXIT_FAILED, EXIT_OK, say_error
from storage.base.ending import command as command_line
from storage.base.ending import say_next
from storage.base.options import as_words
from storage.base.programs import program
from storage.base.shown import shown
from storage.base.waiting import waiting

if TYPE_CHECKING:
    from trainer.config.command_line import ImportCommand, TrainCommand
    from trainer.config.schema import TrainConfig
    from trainer.evaluation.options import (
        AnalyseConfig,
        CompareConfig,
        EvaluateConfig,
        ExportConfig,
        GenerateConfig,
        MeasureConfig,
        NoConfig,
        ReportConfig,
        ScoreConfig,
    )
    from trainer.evaluation.probing.sweep import Measure

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
        "FID, sFID, Inception Score, KID, precision, recall and more; or distances in another encoder's features",
        f"{OPTIONS}:EvaluateConfig",
        "trainer.commands:evaluate",
    ),
    "score": Command(
        "from a run to its numbers: draw what is missing, evaluate it, record and report; run it again to go on",
        f"{OPTIONS}:ScoreConfig",
        "trainer.commands:score",
    ),
    "compare": Command(
        "two results side by side, with every setting of the protocol in which they differ",
        f"{OPTIONS}:CompareConfig",
        "trainer.commands:compare",
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
        "make a run, to draw from or to train on, from a public checkpoint of REPA, iREPA, REG, LightningDiT, RAE, "
        "RiT, SiT or DiT",
        "trainer.config.command_line:ImportCommand",
        "trainer.commands:import_run",
    ),
}


def loading() -> AbstractContextManager[None]:
    """Says that libraries are being loaded, which takes seconds; ranks but the first say nothing."""
    return waiting("loading PyTorch", hidden=os.environ.get("RANK", "0") != "0")


def train(command: TrainCommand) -> int:
    """Train or resume; what came of it goes to stdout, from the main rank."""
    from trainer.config.command_line import train_config

    config = train_config(command.settings)  # before torch is loaded, which takes longer than an error
    config.require_store()
    with loading():
        from trainer.loop.non_finite import NonFiniteError
        from trainer.loop.train import train
        from trainer.ranks.world import require_gpu_of_resident

    require_gpu_of_resident(config.device, config.data.resident)
    try:
        summary = train(config, given=command.given, accept_changes=command.resume_with_changes)
    except NonFiniteError as error:
        say_error(str(error))
        return EXIT_FAILED
    if os.environ.get("RANK", "0") == "0":
        from trainer.run.summary import outcome

        if command.json:
            print(json.dumps(summary, indent=1))
            return EXIT_OK
        print(outcome(summary))
        run = summary["run"]
        say_next(command_line("trainer", "generate", run, "--n", "64"), shlex.join(["tensorboard", "--logdir", run]))
    return EXIT_OK


def alignments(config: NoConfig) -> None:
    """Print every kind, and its options."""
    from trainer.alignment import described

    print("\n".join(described()))
    say_next(command_line("trainer", "train", "--help-all"))


def import_run(command: ImportCommand) -> None:
    """Make a run of a public checkpoint."""
    from trainer.config.command_line import train_config

    with loading():
        from trainer.run.folder import RunFolder
        from trainer.run.published import starting_point
        from trainer.run.releases import import_checkpoint, shapes_of

    settings = command.settings
    base: TrainConfig | None = None
    if settings.get("config") is None:
        with waiting(f"reading {command.file.name}"):
            shapes = shapes_of(command.file, command.release)
            base = starting_point(command.release, shapes, command.file, settings.get("preset") or "")
    config = train_config(settings, base=base)
    with waiting(f"making a run of {command.file.name}"):
        lines = import_checkpoint(command.file, command.release, config)
    print("\n".join(lines))
    say_next(
        command_line("trainer", "generate", config.run, "--n", "64"),
        command_line("trainer", "train", "--config", RunFolder(config.run).config),
    )


def generate(config: GenerateConfig) -> None:
    """Draw images."""
    with loading():
        from trainer.evaluation.generate.generate import generate
        from trainer.evaluation.generate.outcome import evaluation_of, outcome

    written = generate(config)
    if written:  # of the main rank
        print(outcome(written))
        say_next(evaluation_of(config.run, written[0]))


def evaluate(config: EvaluateConfig) -> None:
    """Measure images against a reference."""
    with loading():
        from trainer.evaluation.quality import measures, spaces
        from trainer.evaluation.quality.description import Description
        from trainer.evaluation.quality.evaluate import evaluate
        from trainer.evaluation.quality.result_files import folder_of, result_file

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    described = {field.name: values.pop(field.name) for field in dataclasses.fields(Description)}
    images, reference, description = values.pop("images"), values.pop("reference"), Description(**described)
    del values["json"]
    if config.encoder == spaces.NAME:
        result = spaces.evaluate_spaces(images, reference, description, **values)
        lines = spaces.table(result)
    else:
        del values["held_out"]
        result = evaluate(images, reference, description, **values)
        lines = measures.table(result)
    if config.json:
        print(json.dumps(result, indent=1))
        return
    file = result_file(folder_of(images, config.out), result["name"])
    print(lines)
    print(f"written to {shown(str(file))}" + (f", recorded in {shown(str(config.run))}" if config.run else ""))
    say_next(_after_evaluation(config, file))


def _after_evaluation(config: EvaluateConfig, file: Path) -> str:
    """A page about the runs beside the one that the result is of; without one, the result itself."""
    if config.run is not None:
        beside = config.run.absolute().parent
        return command_line("trainer", "report", beside, "--out", beside / "report.html")
    return shlex.join(["python", "-m", "json.tool", str(file)])


def score(config: ScoreConfig) -> None:
    """Draw, evaluate, record, report, print."""
    with loading():
        from trainer.evaluation.score import score

    lines = score(config)
    if lines:  # of the main rank
        print("\n".join(lines))
        beside = config.run.absolute().parent
        say_next(command_line("trainer", "report", beside, "--out", beside / "report.html"))


def compare(config: CompareConfig) -> int:
    """Print two results and how they differ; status 1 where they were not measured alike."""
    from trainer.evaluation.quality.compare import as_json, compared, load, text

    a, b = (load(path, config.encoder) for path in (config.a, config.b))
    if config.json:
        print(as_json(a, b))
    else:
        print(text(a, b))
        say_next(command_line("trainer", "compare", *as_words(dataclasses.replace(config, json=True))))
    return EXIT_OK if compared(a, b)["alike"] else EXIT_FAILED


def probe(config: MeasureConfig) -> None:
    """Measure one run by linear probing."""
    _measure(config, "probe")


def cknna(config: MeasureConfig) -> None:
    """Measure one run by CKNNA."""
    _measure(config, "cknna")


def _measure(config: MeasureConfig, measure: Measure) -> None:
    with loading():
        from trainer.evaluation.probing.analyse import write_measure
        from trainer.evaluation.probing.outcome import best_blocks

    paths = write_measure(config.run, config, measure, config.out)
    record = next(path for path in paths if path.suffix == ".json")
    print(best_blocks(json.loads(record.read_text()), measure))
    _print_paths(paths)
    say_next(command_line("trainer", "report", config.run))


def analyse(config: AnalyseConfig) -> None:
    """Draw the paper's figures."""
    with loading():
        from trainer.evaluation.probing.analyse import write_analysis
        from trainer.evaluation.probing.outcome import best_of_runs

    paths = write_analysis(config.runs, config, config.out)
    figures = next(path for path in paths if path.suffix == ".json")
    print(best_of_runs(json.loads(figures.read_text())["runs"]))
    _print_paths(paths)
    say_next(command_line("trainer", "report", *config.runs, "--out", config.out / "report.html"))


def report(config: ReportConfig) -> None:
    """Write the page."""
    with loading():
        from trainer.evaluation.report.outcome import outcome
        from trainer.evaluation.report.page import write_page
        from trainer.evaluation.report.run_record import read_runs

    with waiting("reading the runs"):
        records = read_runs(config.runs)
    with waiting("drawing the page"):
        write_page(records, config.out, config.title)
        lines, following = outcome(records, config.out)
    print(lines)
    say_next(following)


def export(config: ExportConfig) -> None:
    """Write weights for other programs."""
    with loading():
        from trainer.evaluation.export.export import export
        from trainer.evaluation.export.outcome import look_at, outcome

    with waiting(f"reading weights, writing them for {config.to}"):
        (folder,) = export(config.run, config.to, config.out, config.checkpoint)
    print(outcome(folder, config.to))
    say_next(look_at(folder, config.to))


def _print_paths(written: Iterable[Path]) -> None:
    for path in written:
        print(path)
