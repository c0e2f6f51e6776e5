"""What the encoders of stage one can do on one GPU: images a second, and hours for ImageNet's 1,281,167.

    python -m benchmarks.encoders [--batch 64] [--seconds 2]

Architectures at full size with random weights, images uint8 on the device already, results left there: the arithmetic
of stage one and nothing else, in each precision it may run in, with and without torch.compile. Precisions other than
float32 are autocast, as in stage one. Last, both encoders one after the other, which is what an image costs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.online import (
    ENCODERS,
    encode_moments,
    encode_tokens,
    make_vae,
    make_vision,
    random_images,
    vae_flops,
    vision_flops,
)
from benchmarks.report import RESULTS, machine, table
from storage.base.console import EXIT_OK, run_command
from trainer.ranks.world import world_of_ranks

PROG = "python -m benchmarks.encoders"
IMAGENET = 1_281_167
AUTOCAST = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER = ("encoder", "precision", "images/s", "TFLOP/s", "peak GB", "hours for ImageNet")


def contestants(vision: str, compiled: bool, device: torch.device) -> dict[str, tuple[Callable[[Tensor], Any], float]]:
    """By name: what encodes images, and its FLOPs an image. Compilations are new each time, since precisions differ."""
    vit, vae = make_vision(vision).to(device), make_vae().to(device, memory_format=torch.channels_last)
    if compiled:
        for block in vit.blocks:
            block.compile()
        vae.encoder.compile()
    flops = {"SD-VAE": vae_flops(), vision: vision_flops(vision)}
    functions: dict[str, Callable[[Tensor], Any]] = {
        "SD-VAE": lambda images: encode_moments(vae, images),
        vision: lambda images: encode_tokens(vit, images),
    }
    both = list(functions.values())
    functions["both"] = lambda images: [encode(images) for encode in both]
    return {name: (function, flops.get(name, sum(flops.values()))) for name, function in functions.items()}


def rate(encode: Callable[[Tensor], Any], images: Tensor, seconds: float) -> float:
    """Images a second, after three batches untimed."""

    def wait() -> None:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    for _ in range(3):
        encode(images)
    wait()
    n, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        encode(images)
        wait()
        n += 1
    return n * len(images) / (time.perf_counter() - start_s)


def measure(args: argparse.Namespace, device: torch.device, precision: str, compiled: bool) -> list[list[str]]:
    """The lines of one precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    half = AUTOCAST[precision]
    lines = []
    images = random_images(args.batch, device)
    for name, (encode, flops) in contestants(args.encoder, compiled, device).items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, dtype=half) if half else nullcontext():
            images_s = rate(encode, images, args.seconds)
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "–"
        lines.append([
            name, f"{precision}, compiled" if compiled else precision, f"{images_s:,.1f}",
            f"{images_s * flops / 1e12:.1f}", peak, f"{IMAGENET / images_s / 3600:.2f}",
        ])  # fmt: skip
        print(", ".join(lines[-1]), flush=True)
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure every precision, print and save the table."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", choices=ENCODERS, default="dinov2-vitb14")
    parser.add_argument("--precisions", default=",".join(AUTOCAST), help=f"of {', '.join(AUTOCAST)}")
    parser.add_argument("--compile", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--batch", type=int, default=64, help="images a call (default 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timed run (default 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table is written")
    args = parser.parse_args(argv)
    with world_of_ranks(args.device) as world:
        device = world.device
    modes = {"both": (False, True), "yes": (True,), "no": (False,)}[args.compile]
    lines: list[list[str]] = []
    for precision, compiled in itertools.product(args.precisions.split(","), modes):
        lines += measure(args, device, precision, compiled)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        text = "\n".join([
            "## Encoders of stage one", "", f"{name}; {machine(Path(), ('torch', 'timm', 'diffusers'))}", "",
            f"Batches of {args.batch} images at 256 px, {args.seconds:g} s each.", "", table(HEADER, lines), "",
        ])  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "encoders.md").write_text(text)
    print(text)
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
