"""Features as the latents beside an autoencoder's, on real photographs: RiT and SiT at equal steps and equal FLOPs.

    python -m benchmarks.feature_latents --data TRAIN --heldout HELDOUT --train-store STORE --heldout-store STORE \
        --features dinov2-vits14:layer=8 --encoder-weights FILE --second-weights FILE.pth --out FOLDER

The stores are those of `benchmarks.repa_effect` (its --out has them): an autoencoder's latents and the encoder's
features of the same images, with flips. `benchmarks.photo_decoder` trains a decoder of the features, two models train
from the store by `python -m trainer train`, and what each draws is compared with the training images in the features
of two encoders, of which one is the encoder that RiT learns.

- RiT on the features (predicts x, noise levels shifted, class token and label's tokens in the sequence)
- SiT on the latents (velocity, uniform times), a little wider, so that a step costs the same within three per cent

Both draw by Heun in 25 steps, without guidance. What a decoder alone costs is measured too: PSNR on the held-out
images, and the distances of what it makes of the latents that its model learns.
The same command goes on after any kill. Cost at 3,000 steps: some four hours of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.effect.measure import (
    ALIGNED_EYES,
    OTHER_EYES,
    Setting,
    compare,
    distances,
    missing_distances,
    write_references,
)
from benchmarks.repa_effect import Commands, StoppedError
from benchmarks.report import RESULTS, machine, table
from pipeline.encoders.registry import resolve_features
from storage.base.console import Parser, run_command
from storage.base.errors import UserError
from trainer.models.flops import forward_flops_per_image
from trainer.models.make import make_model
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder
from trainer.run.opened import open_run

PROG = "python -m benchmarks.feature_latents"
COMMON: dict[str, str] = {
    "batch": "32",
    "optim.lr": "5e-4",
    "optim.beta2": "0.95",
    "optim.warmup": "200",
    "optim.clip": "1",
    "ema-decay": "0.995",  # of 0.999 a fifth would still be the first weights after 1,500 steps
    "log.samples-every": "0",
    "log.tensorboard": "false",
}
FEATURES_RUN, LATENTS_RUN = "rit-features", "sit-latents"
DECODED = "decoded"  # beside the steps, of the latents themselves
RUNS: dict[str, dict[str, str]] = {
    FEATURES_RUN: {
        "preset": "rit-xl-1",
        "data.resolution": "0",  # the preset's is ImageNet's
        "model.width": "384",
        "model.depth": "4",
        "model.heads": "6",
        "model.context": "8",
        "model.context-block": "2",
    },
    LATENTS_RUN: {
        "preset": "sit-tiny-2",
        "model.width": "416",
        "model.depth": "4",
        "model.heads": "8",
        "loss.projection-weight": "0",
    },
}
SAMPLING = {"sampler": "ode", "steps": "25", "heun": "true", "guidance": "1"}  # and the precision of training


def train_command(name: str, setting: Setting, step: int, decoder: Path, seed: int = 0) -> list[str]:
    """The trainer's command line to a step; a larger one goes on."""
    of_features = {"data.latents": f"features/{setting.features}", "data.decoder": str(decoder)}
    options = {
        **COMMON,
        **RUNS[name],
        **(of_features if name == FEATURES_RUN else {}),
        "precision": setting.sampling["precision"],
        "seed": str(seed),
        "steps": str(step),
        "store": str(setting.train_store),
        "run": str(setting.out / "runs" / name),
        "checkpoint.every": "250",
    }
    return ["trainer", "train", *(f"--{option}={value}" for option, value in options.items())]


def bring(name: str, setting: Setting, steps: Sequence[int], decoder: Path, command: Commands) -> None:
    """Train a run to its end, measured at each of `steps`; nothing that is there is done again."""
    run = setting.out / "runs" / name
    for step in sorted(steps):
        folder = setting.folder(name, step)
        if not missing_distances(setting, folder):
            continue
        checkpoint = latest_checkpoint(run)
        if checkpoint is None or read_state(checkpoint).step < step:
            command(train_command(name, setting, step, decoder))
        folder.mkdir(parents=True, exist_ok=True)
        distances(setting, run, step, folder, command)
        print(f"{time.strftime('%H:%M:%S')} {name} measured at step {step:,}", flush=True)
    reconstruct(run, setting, command)


def reconstruct(run: Path, setting: Setting, command: Commands) -> None:
    """Distances of what the run's decoder makes of the latents that it learns."""
    folder = setting.measures / run.name / DECODED
    if not missing_distances(setting, folder):
        return
    images = folder / "samples"
    n = str(setting.n_images)
    command(["benchmarks.effect.reconstructions", str(run), "--n", n, "--out", str(images)])
    compare(setting, images, folder, command)


def prepare(setting: Setting, command: Commands) -> None:
    """The statistics of the features' places, and the references."""
    command(["storage", "statistics", str(setting.train_store), f"features/{setting.features}", "--places"])
    write_references(setting, command)


def make_decoder(args: argparse.Namespace, setting: Setting, decoder: Path, command: Commands) -> None:
    """A decoder of the features, once."""
    if not (decoder / "psnr.json").is_file():
        command(
            ["benchmarks.photo_decoder", "--data", args.data, "--store", str(setting.train_store), "--heldout",
             args.heldout, "--heldout-store", str(setting.heldout_store), "--features", f"features/{setting.features}",
             "--out", str(decoder), "--steps", str(args.decoder_steps), "--threads", str(args.threads),
             "--precision", args.precision]
        )  # fmt: skip


def read_results(measures: Path) -> dict[str, dict[float, dict[str, float]]]:
    """Run → step → encoder → Fréchet distance, of what is there; no step comes to the latents themselves, infinity."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for name in RUNS:
        for path in sorted(measures.glob(f"{name}/*/*.json")):
            step = math.inf if path.parent.name == DECODED else int(path.parent.name)
            value = json.loads(path.read_text())["metrics"]["fd"]["value"]
            found.setdefault(name, {}).setdefault(step, {})[path.stem] = value
    return found


def cost_of(run: Path) -> str:
    """Parameters and GFLOP of a run's model, in words; "" where there is no run yet."""
    if not RunFolder(run).is_run:
        return ""
    opened = open_run(run)
    opened.data.close()
    gflop = 3 * forward_flops_per_image(opened.geometry, with_projections=False) / 1e9
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in make_model(opened.geometry).parameters())
    return f"{run.name}: {n_parameters / 1e6:.1f} M parameters, {gflop:.2f} GFLOP an image, forward and backward."


def lines(
    found: Mapping[str, Mapping[float, Mapping[str, float]]], psnr: Mapping[str, Any], costs: Sequence[str]
) -> str:
    """The table, what the models cost, and what the decoder reaches on held-out images."""
    steps = sorted({step for of in found.values() for step in of})
    headings = ["the latents, decoded" if step == math.inf else f"{step:,} steps" for step in steps]
    rows = [
        [f"{name}, {eyes}", *(f"{of[step][eyes]:.3f}" if eyes in of.get(step, {}) else "–" for step in steps)]
        for name, of in found.items()
        for eyes in (ALIGNED_EYES, OTHER_EYES)
        if any(eyes in values for values in of.values())
    ]
    parts = [table(["Fréchet distance", *headings], rows), *filter(None, costs)]
    if psnr:
        parts.append(f"The features' decoder on {psnr['n']:,.0f} held-out images: {psnr['mean_db']:.2f} dB.")
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Work, then report; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "heldout"):
        parser.add_argument(f"--{name}", required=True, help="as of `python -m pipeline precompute --data`")
    for name in ("train-store", "heldout-store"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--features", default="dinov2-vits14:layer=8", help="encoder whose tokens are the latents")
    parser.add_argument("--encoder-weights", type=Path, help="its weight file")
    parser.add_argument("--second-weights", type=Path, help="EfficientNet-Lite0's weights; without, one distance only")
    parser.add_argument("--out", type=Path, required=True, help="folder of decoder, runs and measures")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 2000, 3000], help="to train to and measure at")
    parser.add_argument("--decoder-steps", type=int, default=4000)
    parser.add_argument("--images", type=int, default=2000, help="images drawn for a Fréchet distance")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both models and the decoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many, and save")
    parser.add_argument("--results", type=Path, default=RESULTS / "feature_latents.md", help="file of the table")
    parser.add_argument("--report", action="store_true", help="write the results that are there, and end")
    args = parser.parse_args(argv)
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    decoder = out / f"decoder-{args.precision}"  # as the measures: nothing of the other is taken for it
    setting = Setting(
        out=out,
        train_store=args.train_store.absolute(),
        heldout_store=args.heldout_store.absolute(),
        features=resolve_features(args.features).store_name,
        encoder=args.features,
        encoder_weights=args.encoder_weights,
        second_weights=args.second_weights,
        n_images=args.images,
        sampling={**SAMPLING, "precision": args.precision},
        measures=out / f"measures-{args.precision}",
    )
    failed: list[str] = []
    if not args.report:
        command = Commands(out / "commands.log", args.threads, time.monotonic() + args.minutes * 60)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, command.stop)
        try:
            prepare(setting, command)

            def of_run(name: str) -> None:
                if name == FEATURES_RUN:
                    make_decoder(args, setting, decoder, command)
                bring(name, setting, args.steps, decoder, command)

            with ThreadPoolExecutor(len(RUNS)) as pool:
                for work in [pool.submit(of_run, name) for name in RUNS]:
                    try:
                        work.result()
                    except UserError as error:
                        failed.append(str(error))
                        print(error, file=sys.stderr, flush=True)
        except StoppedError:
            pass
    psnr = json.loads((decoder / "psnr.json").read_text()) if (decoder / "psnr.json").is_file() else {}
    text = lines(read_results(setting.measures), psnr, [cost_of(out / "runs" / name) for name in RUNS])
    about = machine(out, ("torch", "numpy"))
    heading = f"## Features as latents beside an autoencoder's, both models in {args.precision}"
    of_all = f"{args.images:,} images a Fréchet distance, batches of {COMMON['batch']}, one seed."
    args.results.write_text(f"{heading}\n\n{about}\n\n{of_all}\n\n{text}\n")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main, PROG)
