"""The options of `evaluate`, `probe`, `cknna` and `analyse`, and what runs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from storage.base.console import EXIT_OK, Parser
from storage.roots import is_url

COMMANDS = ("evaluate", "probe", "cknna", "analyse")
ANALYSE_TIMES = (0.25, 0.5, 0.75)


def named_path(text: str) -> Path:
    """A path option; an empty one is a variable that was forgotten, not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty (make evaluate needs both IMAGES=… and REFERENCE=…)")
    return Path(text)


def named_place(text: str) -> Path | str:
    """A path, or a URL, which is none."""
    return text if is_url(text) else named_path(text)


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the four parsers."""
    evaluate = commands.add_parser("evaluate", help="FID, sFID, Inception Score, precision and recall of images")
    evaluate.add_argument("images", type=named_path, help="folder of images, an .npz with arr_0, or a feature file")
    evaluate.add_argument(
        "--reference",
        type=named_place,
        required=True,
        help="ADM reference .npz, folder of images, store (or its URL), or feature file",
    )
    evaluate.add_argument("--encoder", default="inception", help="inception, or a vision encoder (default inception)")
    evaluate.add_argument("--weights", "--inception-weights", type=Path, help="the encoder's weight file")
    evaluate.add_argument(
        "--token",
        choices=["cls", "mean"],
        default="cls",
        help="a vision encoder's vector: class token, or mean of patches",
    )
    evaluate.add_argument("--resolution", type=int, default=0, help="side to crop folders' images to (default: do not)")
    evaluate.add_argument(
        "--n-reference", type=int, default=0, help="at most so many reference images, evenly spread (default: all)"
    )
    evaluate.add_argument("--out", type=Path, help="folder of the result (default IMAGES-evaluation)")
    evaluate.add_argument(
        "--cache", type=Path, help="folder that keeps a reference's features (default reference-features, by the runs)"
    )
    evaluate.add_argument(
        "--max-failures",
        type=float,
        default=0.001,
        help="end when more than this share of the images (but at least 10) cannot be read (default 0.001)",
    )
    evaluate.add_argument("--run", type=Path, help="record the result in this run, for analyse and the report")
    evaluate.add_argument("--step", type=int, help="step that the images are of (default: what generate noted)")
    evaluate.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")
    for name, help_text in (
        ("probe", "linear probing of hidden states over blocks, times and checkpoints"),
        ("cknna", "alignment of hidden states with a store's features"),
    ):
        parser = commands.add_parser(name, help=help_text)
        parser.add_argument("run", type=Path, help="folder of the run")
        add_sweep_options(parser, (0.5,))
        parser.add_argument("--checkpoints", default="latest", help="latest, all, or steps: 1000,2000 (default latest)")
        parser.add_argument("--out", type=Path, help=f"PNG and JSON to write (default RUN/analysis/{name})")
    analyse = commands.add_parser("analyse", help="the paper's analysis figures, for any set of runs")
    analyse.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    add_sweep_options(analyse, ANALYSE_TIMES)
    analyse.add_argument("--out", type=Path, default=Path("analysis"), help="folder to write (default analysis)")


def add_sweep_options(parser: Parser, times: tuple[float, ...]) -> None:
    """What `probe`, `cknna` and `analyse` share."""
    shown = " ".join(f"{t:g}" for t in times)
    parser.add_argument("--blocks", default="all", help="all, or numbers from 1: 4,8 (default all)")
    parser.add_argument(
        "--times", type=float, nargs="+", default=list(times), help=f"0 the image, 1 noise (default {shown})"
    )
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="(default ema)")
    parser.add_argument("--n", type=int, default=10_000, help="at most so many samples, chosen by seed (default 10000)")
    parser.add_argument("--k", type=int, default=10, help="CKNNA's neighbours (default 10)")
    parser.add_argument("--c", type=float, default=1.0, help="the probe's C, 1 / weight penalty (default 1)")
    parser.add_argument("--store", default="", help="another store of the same VAE (default: the run's)")
    parser.add_argument(
        "--features", default="", help="features below the store (default: the run's, or the only ones)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples and of the noise (default 0)")
    parser.add_argument("--batch", type=int, default=64, help="images at once (default 64)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of COMMANDS with its parsed options; returns the exit status."""
    if command == "evaluate":
        from trainer.evaluation.quality.evaluate import Description, evaluate, table

        described = {
            name: values.pop(name) for name in ("encoder", "weights", "token", "resolution", "device", "max_failures")
        }
        print(table(evaluate(values.pop("images"), values.pop("reference"), Description(**described), **values)))
        return EXIT_OK
    from trainer.evaluation.probing.analyse import write_analysis, write_measure
    from trainer.evaluation.probing.sweep import SweepConfig

    out, target = values.pop("out"), values.pop("runs" if command == "analyse" else "run")
    config = SweepConfig(**{**values, "times": tuple(values["times"])})
    if command == "analyse":
        written = write_analysis(target, config, out)
    else:
        written = write_measure(target, config, command, out)  # type: ignore[arg-type]
    for path in written:
        print(path)
    return EXIT_OK
