"""`python -m benchmarks.flops`: what a training step of each method costs, counted; the table of docs/methods.md."""

from __future__ import annotations

from benchmarks.methods import method, step_flops
from benchmarks.report import table
from trainer.config.presets import PRESETS

SIZES = ("s", "b", "l", "xl")
ROWS = {  # what the table calls a method: its name, with the size left open
    "REPA": "sit-{}-2",
    "iREPA": "sit-{}-2:irepa",
    "iREPA, kernel 1": "sit-{}-2:irepa-1",
    "REG": "sit-{}-2-reg",
    "vanilla": "sit-{}-2-vanilla",
    "REPA after a stop": "sit-{}-2:stopped",
    "REPA, latents of 32×16×16, patch 1": "sit-{}-1",
    "LightningDiT, latents of 32×16×16": "lightningdit-{}-1",
    "RiT, latents of 384×16×16": "rit-{}-1",
    "DiT^DH, latents of 768×16×16": "ditdh-{}-1",
}


def lines() -> str:
    """The table: GFLOP of forward and backward pass of one image at 256 px, features 768 wide."""
    cells = [[row, *(_gflop(name.format(size)) for size in SIZES)] for row, name in ROWS.items()]
    return table(("GFLOP an image", *(size.upper() for size in SIZES)), cells)


def _gflop(name: str) -> str:
    return f"{step_flops(method(name)) / 1e9:.0f}" if name.partition(":")[0] in PRESETS else "–"


if __name__ == "__main__":
    print(lines())
