"""The commands of `python -m pipeline`: their options, and what they print. What a command does is imported by it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from storage.base.commands import Command
from storage.base.console import EXIT_FAILED, EXIT_OK, say
from storage.base.ending import command as command_line
from storage.base.ending import say_next
from storage.base.errors import UserError
from storage.base.options import as_words
from storage.base.programs import program
from storage.base.waiting import waited, waiting

if TYPE_CHECKING:
    from pipeline.config import (
        DemoConfig,
        FeaturesCommand,
        IndexConfig,
        LaunchConfig,
        NoConfig,
        OriginalsConfig,
        PrecomputeConfig,
        PreviewConfig,
        StoreConfig,
        TasksConfig,
    )
    from pipeline.precompute import Where

PROG = program("pipeline")


def command(help_text: str, options: str, run: str) -> Command:
    """A command whose options are in `config.py` and whose function is here."""
    return Command(help_text, f"pipeline.config:{options}", f"pipeline.commands:{run}")


COMMANDS = {
    "index": command("what a data set holds, before anything is encoded", "IndexConfig", "index"),
    "precompute": command(
        "encode every image of a data set into a feature store; run it again to go on", "PrecomputeConfig", "precompute"
    ),
    "encoders": command(
        "the encoders there are: what they store, their preprocessing, whose weights they take", "NoConfig", "encoders"
    ),
    "status": command(
        "how far a store is, how fast it gets on, and whether a run is at work on it", "StoreConfig", "status"
    ),
    "preview": command(
        "pictures of what a store holds: reconstructions and principal components", "PreviewConfig", "preview"
    ),
    "originals": command("the images that rows of a store were made of, as PNGs", "OriginalsConfig", "originals"),
    "features": command(
        "one vector an image from Inception or a vision encoder, for `python -m trainer evaluate`",
        "FeaturesCommand",
        "features",
    ),
    "tasks": command("command lines as Ray tasks, for `python -m trainer ablate`", "TasksConfig", "tasks"),
    "demo": command("both stages on digits over photographs, with alignment and without", "DemoConfig", "demo"),
    "launch": command(
        "train on a Ray cluster: the trainer's own command, on workers that Ray Train places", "LaunchConfig", "launch"
    ),
}


def loading(*, hidden: bool = False) -> AbstractContextManager[None]:
    """Says that libraries are being loaded, which takes seconds from a cold disk."""
    return waiting("loading libraries", hidden=hidden)


def precompute(config: PrecomputeConfig) -> int:
    """Run stage one on the cluster that the option or the environment names."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "")
    return report_precompute(dataclasses.replace(config, ray_address=address))


def report_precompute(config: PrecomputeConfig, where: Where | None = None) -> int:
    """Run stage one, on Ray unless `where` says otherwise; prints the plan, the progress and the outcome."""
    with loading():
        from pipeline.precompute import on_ray, precompute

    summary = precompute(config, where or on_ray)
    status = EXIT_FAILED if summary.units_given_up else EXIT_OK
    if config.json:
        print(json.dumps(dataclasses.asdict(summary), indent=1))
        return status
    if config.dry_run:
        print("a dry run: nothing was written")
        say_next(command_line("pipeline", "precompute", *as_words(dataclasses.replace(config, dry_run=False))))
        return status
    print(summary.table())
    if summary.units_given_up:
        print("mend what is said above and run the same command again")
        say_next(command_line("pipeline", "status", summary.store))
        return status
    from pipeline.next_step import train_commands

    say_next(command_line("storage", "ls", summary.store), *train_commands(summary.store, summary.bytes_per_image))
    return status


def index(config: IndexConfig) -> None:
    """Print what the source lists."""
    with loading():
        from pipeline.index import report
        from pipeline.sources import open_source
        from storage.roots import absolute

    with waiting(f"listing {config.data}"):  # minutes, for a million headers far away
        source = open_source(absolute(config.data), config.source)
        lines = report(source, source.listing(config.labels)).splitlines()
    say(*lines)
    name = re.sub(r"[^\w.-]", "", Path(config.data).stem) or "images"
    words = ["--data", *as_words(config), "--store", f"stores/{name}", "--dry-run"]
    say_next(command_line("pipeline", "precompute", *words))


def encoders(config: NoConfig) -> None:
    """Print every encoder."""
    from pipeline.encoders.listing import list_encoders

    print(list_encoders())
    say_next(command_line("pipeline", "precompute", "--help"))


def status(config: StoreConfig) -> None:
    """Print units, rate, failures."""
    with loading():
        from pipeline.next_step import train_commands
        from pipeline.status import status
        from storage import StoreError

    for line in waited("reading receipts", status(config.store)):
        say(line)
    try:
        train = train_commands(config.store)
    except StoreError:  # said above, of each group
        train = []
    say_next(command_line("storage", "verify", config.store), *train)


def preview(config: PreviewConfig) -> None:
    """Write reconstruction.png and features.png."""
    with loading():
        from pipeline.preview import write_preview
        from storage import open_store

    for picture in write_preview(config.store, config.out, n_images=config.images, vae=config.vae):
        say(f"{picture.path}  {picture.caption}")
    rows = ["--rows", *map(str, range(min(config.images, open_store(config.store).n_rows)))]
    originals = command_line("pipeline", "originals", config.store, *rows, "--out", config.out / "originals")
    say_next(originals, command_line("pipeline", "status", config.store))


def originals(config: OriginalsConfig) -> None:
    """Write the images of rows."""
    with loading():
        from pipeline.originals import write_originals

    with waiting("reading the originals"):
        written = write_originals(config.store, config.rows, config.out)
    for image in written:
        say(str(image.path) if image.path else f"row {image.row} left out: {image.reason}")
    say_next(command_line("pipeline", "preview", config.store, "--out", config.out))


def features(config: FeaturesCommand) -> None:
    """Describe sets of images, one feature file each."""
    # Who checks by this command says so itself.
    with loading(hidden=config.check and not config.next):
        from pipeline.features import Job, write_features

    limits = config.n * len(config.where) if len(config.n) == 1 else config.n
    if not len(config.where) == len(config.out) == len(limits):
        raise UserError(
            f"--out and --n take one for each of the {len(config.where)} IMAGES, got {len(config.out)}, {len(limits)}"
        )
    jobs = [Job(where=w, out=o, limit=n) for w, o, n in zip(config.where, config.out, limits, strict=True)]
    for line in write_features(jobs, config):
        say(line)
    if config.check or not config.next:
        return
    if len(config.out) > 1:
        say_next(command_line("trainer", "evaluate", config.out[0], "--reference", config.out[1]))
    else:
        say_next(command_line("trainer", "evaluate", "--help"))


def tasks(config: TasksConfig) -> int:
    """Run command lines on Ray."""
    from pipeline.cluster.environment import prepare_ray

    address = prepare_ray(config.ray_address)
    with loading():
        from pipeline.launching.tasks import run_tasks  # imports Ray

    return run_tasks(config.listed, address)


def demo(config: DemoConfig) -> int:
    """Run both stages, or the first."""
    with loading():
        from pipeline.demo import demo_config, run_demo

    out = config.out.absolute()
    return report_precompute(demo_config(out)) if config.only_precompute else run_demo(out, steps=config.steps)


def launch(config: LaunchConfig) -> int:
    """Train on a cluster."""
    with loading():
        from pipeline.launching.ranks import launch

    return launch(
        [argument for i, argument in enumerate(config.arguments) if i or argument != "--"],
        address=config.ray_address or os.environ.get("RAY_ADDRESS", ""),
        workers=config.workers,
        cpus=config.cpus,
        restarts=config.restarts,
        scratch=config.scratch,
    )
