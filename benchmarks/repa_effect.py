"""What REPA does to training, measured where it can be: the built-in photographs and encoders, at equal steps.

    python -m benchmarks.repa_effect [--steps 1000] [--seeds 0 1 2]

Every seed trains `sit-tiny-2` twice from the same store, with the alignment loss and without (λ = 0). Initial weights
of the transformer, order, noise, times and dropped labels of both are equal, since all are keyed by the seed: a
difference within a pair is the alignment's.

- denoising loss: mean of the last tenth of the steps, over the training crops
- alignment: mean cosine between projection and features over the same steps; a run without has no projector
- CKNNA and linear probe: of each block's hidden states (raw weights, t = 0.5) against the stored features and labels of
  held-out crops, which share no pixel with the training crops; the best block, and the mean over blocks

Models of 1.4 M parameters on 16 photographs say whether the mechanism works, not what it gains on ImageNet. A run that
is there is reused. Cost: about 2 minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, machine, table
from pipeline.sources.photos import write_photos

WEIGHTS = {"REPA": "0.5", "vanilla": "0"}
HELD_OUT_A_CLASS = 25
MEASURES = ("denoising loss", "alignment", "probe, best", "probe, mean", "CKNNA, best", "CKNNA, mean")


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def make_stores(out: Path) -> tuple[Path, Path]:
    """The demo's store, and one of held-out crops with the same encoders."""
    command("pipeline", "demo", "--out", str(out), "--only-precompute")
    photos, store = out / "heldout-photographs", out / "heldout"
    write_photos(photos, n_per_class=HELD_OUT_A_CLASS, split="heldout")
    command(
        "pipeline", "precompute", "--data", str(photos), "--store", str(store), "--latents", "tiny-vae",
        "--features", "tiny-vit", "--resolution", "128", "--shard-rows", "128",
    )  # fmt: skip
    return out / "store", store


def measure(out: Path, stores: tuple[Path, Path], kind: str, seed: int, steps: int) -> dict[str, float]:
    """Train one run, unless it is there, and measure it."""
    run = out / f"{kind.lower()}-{seed}"
    command(
        "trainer", "train", "--store", str(stores[0]), "--preset", "sit-tiny-2", "--run", str(run), "--seed", str(seed),
        "--steps", str(steps), "--loss.projection-weight", WEIGHTS[kind], "--log.tensorboard", "false",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tail = [line for line in lines if line["step"] > steps * 0.9]
    found = {"denoising loss": statistics.mean(line["denoising_loss"] for line in tail)}
    if kind == "REPA":
        found["alignment"] = -statistics.mean(line["alignment_loss"] for line in tail)
    for name, title in (("probe", "probe"), ("cknna", "CKNNA")):
        target = run / f"{name}-heldout"
        command(
            "trainer", name, str(run), "--store", str(stores[1]), "--features", "tiny-vit", "--weights", "raw",
            "--out", str(target),
        )  # fmt: skip
        values = [point[name] for point in json.loads(target.with_suffix(".json").read_text())["points"]]
        found |= {f"{title}, best": max(values), f"{title}, mean": statistics.mean(values)}
    return found


def report(found: dict[str, list[dict[str, float]]], seeds: Sequence[int], steps: int) -> str:
    """The table: a row a run, then the mean difference and how many seeds agree in its sign."""

    def shown(values: dict[str, float], sign: str = "") -> list[str]:
        return [f"{values[name]:{sign}.4f}" if name in values else "–" for name in MEASURES]

    rows = [[f"{kind}, seed {seed}", *shown(runs[i])] for i, seed in enumerate(seeds) for kind, runs in found.items()]
    pairs: dict[str, Any] = {
        name: [a[name] - b[name] for a, b in zip(found["REPA"], found["vanilla"], strict=True)]
        for name in MEASURES
        if name != "alignment"
    }
    rows.append(["REPA − vanilla, mean", *shown({name: statistics.mean(d) for name, d in pairs.items()}, "+")])
    signs = {name: f"{max(sum(d > 0 for d in ds), sum(d < 0 for d in ds))} of {len(ds)}" for name, ds in pairs.items()}
    rows.append(["seeds of the same sign", *(signs.get(name, "–") for name in MEASURES)])
    heading = f"REPA against vanilla, sit-tiny-2 on the built-in photographs, {steps:,} steps"
    return "\n".join(
        [f"## {heading}", "", machine(Path(), ("torch", "numpy")), "", table(["run", *MEASURES], rows), ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/repa-effect"), help="folder of stores and runs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out: Path = args.out.absolute()
    stores = make_stores(out)
    found = {kind: [measure(out, stores, kind, seed, args.steps) for seed in args.seeds] for kind in WEIGHTS}
    text = report(found, args.seeds, args.steps)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "repa_effect.md").write_text(text)


if __name__ == "__main__":
    main()
