"""`python -m pipeline`: stage one, and what else runs on Ray.

index        what a data set holds, before anything is encoded
precompute   encode every image of a data set into a feature store; run it again to go on
encoders     the encoders there are: what they store, their preprocessing, whose weights they take
status       how far a store is, how fast it gets on, and whether a run is at work on it
preview      pictures of what a store holds: reconstructions and principal components
features     one vector an image from Inception or a vision encoder, for `python -m trainer evaluate`
tasks        command lines as Ray tasks, for `python -m trainer ablate`
demo         both stages on the built-in photographs
launch       train on a Ray cluster: the trainer's own command, on workers that Ray Train places
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import PrecomputeConfig
from storage.base.console import EXIT_FAILED, EXIT_OK, Parser, run_command, say
from storage.base.errors import UserError
from storage.roots import absolute

PROG = "python -m pipeline"


LABEL_FIELDS = ("label_column", "unlabelled", "partly_labelled", "renumber_labels")


def add_options(parser: Parser, names: Sequence[str] = ()) -> None:
    """One option a field of PrecomputeConfig, with its help text and default: all fields, or the named ones."""
    hints = typing.get_type_hints(PrecomputeConfig)
    for field in dataclasses.fields(PrecomputeConfig):
        if names and field.name not in names:
            continue
        kind = hints[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(
                flag, help=field.metadata["help"], action=argparse.BooleanOptionalAction, default=field.default
            )
            continue
        required = field.default is dataclasses.MISSING
        shown = "" if required or field.default in (None, "") else f" (default {field.default})"
        parser.add_argument(
            flag,
            help=field.metadata["help"] + shown,
            type=kind,
            required=required,
            default=None if required else field.default,
            metavar=kind.__name__.upper(),
        )


def config_help(name: str) -> str:
    """The help text of a field of PrecomputeConfig."""
    return str(PrecomputeConfig.__dataclass_fields__[name].metadata["help"])


def add_features_options(parser: Parser) -> None:
    """The options of `features`."""
    parser.add_argument(
        "where",
        metavar="IMAGES",
        nargs="+",
        help="folder of images, an .npz with arr_0 (ADM's layout), or a store or its URL; of several, a file each",
    )
    parser.add_argument("--encoder", default="inception", help="inception, or a vision encoder (default inception)")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="feature file to write, .npz")
    parser.add_argument("--weights", type=Path, help="the encoder's weight file (default: its library's cache)")
    parser.add_argument(
        "--token",
        choices=["cls", "mean"],
        default="cls",
        help="a vision encoder's vector (default cls); Inception has one",
    )
    parser.add_argument(
        "--resolution", type=int, default=0, help="side to crop a folder's images to (default: as they are)"
    )
    parser.add_argument("--n", type=int, nargs="+", default=[0], help="at most so many, evenly spread (default: all)")
    parser.add_argument("--batch", type=int, default=50, help="images at once (default 50)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")
    parser.add_argument(
        "--max-failures",
        type=float,
        default=0.001,
        help="end when more than this share of the images (but at least 10) cannot be read (default 0.001)",
    )
    parser.add_argument("--like", type=Path, help="a feature file that the new ones are to be comparable with")
    parser.add_argument("--at-least", type=int, default=1, help="fewer images are refused (default 1)")


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_options(commands.add_parser("precompute", help="encode a data set into a store"))
    index = commands.add_parser("index", help="what was found in DATA: kind, images, classes, what is left out")
    index.add_argument("data", help=config_help("data"))
    add_options(index, ("source", *LABEL_FIELDS))
    commands.add_parser("encoders", help="list every encoder")
    commands.add_parser("status", help="units done and missing, rate, failures").add_argument("store")
    preview = commands.add_parser("preview", help="write reconstruction.png and features.png of a store")
    preview.add_argument("store")
    preview.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    preview.add_argument("--images", type=int, default=8, help="how many images to show (default 8)")
    preview.add_argument(
        "--vae", default="", help="diffusers directory or hub id to decode latents with (default: what the store names)"
    )
    add_features_options(commands.add_parser("features", help="one vector an image, for the trainer's evaluate"))
    tasks = commands.add_parser("tasks", help="run command lines as Ray tasks")
    tasks.add_argument("listed", type=Path, help="JSON file of tasks")
    tasks.add_argument("--ray-address", default="", help="cluster to join; empty or local: start one here and stop it")
    demo = commands.add_parser("demo", help="both stages on the built-in photographs")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything (default runs/demo)")
    demo.add_argument("--steps", type=int, default=None, help="training steps (default 500)")
    demo.add_argument("--only-precompute", action="store_true", help="stop after stage one")
    launched = commands.add_parser("launch", help="train on a Ray cluster")
    launched.add_argument("--workers", type=int, default=1, help="ranks, a GPU each where there are any (default 1)")
    launched.add_argument("--cpus", type=int, default=1, help="CPU cores a rank reads and decodes with (default 1)")
    launched.add_argument("--restarts", type=int, default=0, help="new starts after a lost machine (default 0)")
    launched.add_argument("--scratch", type=Path, default=Path("runs/.ray"), help="shared folder for Ray Train's files")
    launched.add_argument("--ray-address", default="", help="cluster to join (default RAY_ADDRESS; empty: start one)")
    launched.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- train …", help="the trainer's command line"
    )
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    if command == "precompute":
        args["ray_address"] = args["ray_address"] or os.environ.get("RAY_ADDRESS", "")
        return report_precompute(PrecomputeConfig(**args))
    if command == "index":
        from pipeline.index import report
        from pipeline.sources import LabelOptions, open_source

        if not args["data"].strip():
            raise UserError("DATA is empty; name a folder, file, pattern or URL of images")
        wanted = LabelOptions(
            column=args["label_column"],
            unlabelled=args["unlabelled"],
            partly_labelled=args["partly_labelled"],
            renumber=args["renumber_labels"],
        )
        source = open_source(absolute(args["data"]), args["source"])
        say(*report(source, source.listing(wanted)).splitlines())
        return EXIT_OK
    if command == "tasks":
        from pipeline.cluster.environment import prepare_ray

        args["ray_address"] = prepare_ray(args["ray_address"])
        from pipeline.launching.tasks import run_tasks  # imports Ray

        return run_tasks(**args)
    if command == "launch":
        from pipeline.launching.ranks import launch

        return launch(
            [argument for i, argument in enumerate(args["arguments"]) if i or argument != "--"],
            address=args["ray_address"] or os.environ.get("RAY_ADDRESS", ""),
            workers=args["workers"],
            cpus=args["cpus"],
            restarts=args["restarts"],
            scratch=args["scratch"],
        )
    if command == "features":
        from pipeline.features import FeaturesConfig, Job, write_features

        where, outs, limits = args.pop("where"), args.pop("out"), args.pop("n")
        if len(limits) == 1:
            limits *= len(where)
        if not len(where) == len(outs) == len(limits):
            raise UserError(
                f"--out and --n take one for each of the {len(where)} IMAGES, got {len(outs)}, {len(limits)}"
            )
        jobs = [Job(where=w, out=o, limit=n) for w, o, n in zip(where, outs, limits, strict=True)]
        for line in write_features(jobs, FeaturesConfig(**args)):
            print(line)
        return EXIT_OK
    if command == "encoders":
        from pipeline.encoders.listing import list_encoders

        print(list_encoders())
        return EXIT_OK
    if command == "status":
        from pipeline.status import status

        for line in status(args["store"]):
            say(line)
        return EXIT_OK
    if command == "preview":
        from pipeline.preview import write_preview

        for picture in write_preview(args["store"], args["out"], n_images=args["images"], vae=args["vae"]):
            say(f"{picture.path}  {picture.caption}")
        return EXIT_OK
    from pipeline.demo import demo_config, run_demo

    if args["only_precompute"]:
        return report_precompute(demo_config(args["out"].absolute()))
    return run_demo(args["out"].absolute(), steps=args["steps"])


def report_precompute(config: PrecomputeConfig) -> int:
    """Run stage one; prints the plan, the progress and the outcome."""
    from pipeline.precompute import precompute

    summary = precompute(config)
    if config.dry_run:
        print("a dry run: nothing was written")
        return EXIT_OK
    print(json.dumps(dataclasses.asdict(summary), indent=1))
    if summary.units_given_up:
        print(
            "next: mend what is said above and run the same command again   ·   "
            f"python -m pipeline status {shlex.quote(summary.store)}"
        )
        return EXIT_FAILED
    from pipeline.next_step import train_command

    commands = [
        f"python -m storage ls {shlex.quote(summary.store)}",
        train_command(summary.store, summary.bytes_per_image),
    ]
    print(f"next: {'   ·   '.join(filter(None, commands))}")
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
