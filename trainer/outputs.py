"""The options of `generate`, `export`, `report` and `ablate`, and what runs them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from storage.base.console import EXIT_OK, Parser

COMMANDS = ("generate", "export", "report", "ablate")


def named_path(text: str) -> Path:
    """A path option; an empty one is a variable that was forgotten, not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty (make takes it as RUN=…, RUNS=… or FILE=…)")
    return Path(text)


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the four parsers."""
    _add_generate(commands.add_parser("generate", help="draw images from a run; run it again to go on"))
    export = commands.add_parser("export", help="a run's averaged weights for other programs")
    export.add_argument("run", type=named_path, help="folder of the run")
    export.add_argument(
        "--to",
        choices=["diffusers", "safetensors"],
        default="diffusers",
        help="a pipeline folder, or one file of weights (default diffusers)",
    )
    export.add_argument("--out", type=Path, default=None, help="folder to write (default RUN/export-FORMAT)")
    export.add_argument("--checkpoint", default="latest", help="latest, or a step (default latest)")
    report = commands.add_parser("report", help="one HTML page about any number of runs")
    report.add_argument("runs", type=named_path, nargs="+", help="folders of runs, or folders of such folders")
    report.add_argument("--out", type=named_path, default=Path("report.html"), help="(default report.html)")
    report.add_argument("--title", default="", help="heading of the page")
    ablate = commands.add_parser("ablate", help="train every run of an ablation file that is missing")
    ablate.add_argument("file", type=named_path, help="YAML: preset, set, axes, seeds")
    ablate.add_argument("--store", required=True, help="store that every run reads")
    ablate.add_argument(
        "--out", type=Path, default=None, help="folder of the runs (default runs/ablations/FILE's name)"
    )
    ablate.add_argument(
        "--ray-address",
        type=str.strip,
        default=os.environ.get("RAY_ADDRESS", "").strip(),
        help="Ray cluster to train on: auto, host:port or local (default RAY_ADDRESS); empty: runs in turn, here",
    )


def _add_generate(parser: Parser) -> None:
    parser.add_argument("run", type=named_path, help="folder of the run")
    parser.add_argument("--n", type=int, default=50_000, help="how many images (default 50000)")
    parser.add_argument("--out", type=Path, help="folder of the images (default RUN/samples-…, named after settings)")
    parser.add_argument("--checkpoint", default="latest", help="latest, or a step (default latest)")
    parser.add_argument(
        "--labels",
        choices=["balanced", "uniform"],
        default="balanced",
        help="the model's classes in turn, or drawn uniformly (default balanced)",
    )
    parser.add_argument(
        "--format", choices=["png", "npz"], default="png", help="npz: one file in ADM's layout as well (default png)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and labels (default 0)")
    parser.add_argument("--sampler", choices=["sde", "ode", "ddpm"], help="(default: the run's)")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: the run's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the run's)")
    parser.add_argument("--vae", default="", help="VAE to decode with (default: as the store says)")
    parser.add_argument("--batch", type=int, default=64, help="images a block, computed together (default 64)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16", "fp16"],
        default="auto",
        help="arithmetic of the model (default auto: tf32 on cuda, fp32 on cpu)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of COMMANDS with its parsed options; returns the exit status."""
    if command == "ablate":
        from trainer.study.runs import ablate

        return ablate(**values)
    if command == "generate":
        from trainer.evaluation.generate.generate import GenerateConfig, generate

        written = generate(GenerateConfig(**values))
    elif command == "export":
        from trainer.evaluation.export.export import export

        written = export(**values)
    else:
        from trainer.evaluation.report.page import write_report

        written = write_report(**values)
    for path in written:
        print(path)
    return EXIT_OK
