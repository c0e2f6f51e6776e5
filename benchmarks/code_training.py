"""Does training from codes reach what training from exact features does? Equal seeds, held-out photographs.

    python -m benchmarks.code_training --store TRAIN --heldout HELDOUT --features features/A --out FOLDER \
        [--measures FOLDER] [--steps 600] [--jobs 2]

TRAIN and HELDOUT have latents and float16 tokens of one encoder. `python -m storage derive` makes rotated4, rotated2
and rotated1 groups of TRAIN's; `python -m trainer train` then trains a small SiT by REPA and by iREPA from each of the
four, three seeds each. Runs of one seed share weights, order, noise, times and dropped labels, so that a difference is
the codes'. Measured on HELDOUT, with noise and times that are the same for every run:

- the mean cosine of the projection and the **float16** features, or for iREPA what it makes of them, at ten times
- the denoising loss at these times
- a linear probe of every block at t = 0.5 (`python -m trainer probe`, on TRAIN's images): the best block's accuracy

The table gives mean and least to most over seeds, the mean difference from float16 at equal seeds, and whether all
seeds agree on its sign. Everything is done once; the same command goes on after any kill, and `--measures` may hold
what another machine has measured. Cost at 600 steps: 24 runs of some four minutes of two cores, measures included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.effect import arms
from benchmarks.report import RESULTS, machine, table
from storage import open_store
from storage.base.files import write_atomic
from storage.torch.codecs import Tokens
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import sample_latents
from trainer.objectives import OBJECTIVES
from trainer.run.opened import checkpoints_of, load_model, open_run

EXACT, CODES = "float16", ("rotated4", "rotated2", "rotated1")
METHODS = {"REPA": "cosine", "iREPA": "irepa"}
SEEDS = (0, 1, 2)
COMMON: dict[str, str] = {
    **arms.COMMON,
    "model.depth": "6",
    "ema-decay": "0.99",
    "device": "cpu",
}
TIMES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
BATCH = 64


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """A method, a way to store its targets, a seed."""

    seed: int
    method: str
    codec: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.lower()}-{self.codec}-seed{self.seed}"


def command(log: Path, arguments: Sequence[str]) -> None:
    """Run `python -m …`, its output in `log`. Ends the benchmark when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(log, "a", encoding="utf-8") as file:
        line = [sys.executable, "-m", *arguments]
        status = subprocess.run(line, stdout=file, stderr=file, env=environment).returncode
    if status:
        sys.exit(f"{' '.join(arguments)}: status {status}, see {log}")


def groups(store: str, features: str, log: Path) -> dict[str, str]:
    """Codec → name of the group below features/ of TRAIN, made, or finished after a kill."""
    name = features.removeprefix("features/")
    names = {EXACT: name}
    for codec in CODES:
        names[codec] = f"{name}-{codec}"
        command(log, ["storage", "derive", store, features, "--codec", codec, "--name", names[codec]])
    return names


def train(run: Run, store: str, group: str, out: Path, steps: int) -> Path:
    """The run's folder, trained to the end."""
    folder = out / "runs" / run.name
    if not (folder / "summary.json").is_file() or json.loads((folder / "summary.json").read_text())["steps"] < steps:
        options = [f"--{name}={value}" for name, value in COMMON.items()]
        command(
            out / "commands.log",
            ["trainer", "train", "--store", store, "--run", str(folder), f"--steps={steps}", f"--seed={run.seed}",
             f"--data.features={group}", f"--loss.alignment={METHODS[run.method]}", *options],
        )  # fmt: skip
    return folder


@torch.inference_mode()
def heldout(folder: Path, store_path: str, features: str) -> dict[str, float]:
    """Mean cosine to the exact features and mean denoising loss, over rows and times of a store."""
    run = open_run(folder)
    model = load_model(run, checkpoints_of(folder, "latest")[0], "ema", torch.device("cpu"))
    store = open_store(store_path)
    latents, exact = store.group(run.data.latents.path, expect=None), store.group(features, expect=None)
    objective, loss = OBJECTIVES[run.config.model.kind], run.config.loss
    alignment = run.geometry.kinds[0]
    cosines, denoising = [], []
    for rows in _parts(store.n_rows):
        index = torch.from_numpy(rows)
        moments = torch.from_numpy(latents.gather(rows, 0, ["moments"])["moments"])
        labels = torch.from_numpy(store.classes.labels[rows].astype(np.int64))
        batch = Batch(step=0, rows=index, labels=labels, moments=moments, targets=(), stall_s=0.0)
        x = sample_latents(batch, run.scale, 0)
        noise = random_keys.normal(0, "noise", 0, index, x.shape[1:])
        wanted = alignment.prepared(Tokens(torch.from_numpy(exact.tokens(rows))))
        for time in TIMES:
            times = objective.model_times(torch.full((len(x),), time))
            x_t = objective.perturb(x, noise, times, loss)
            output, projections = model(x_t, times, labels, with_projections=True)
            denoising.append(objective.denoising_loss(output, x, noise, x_t, times, loss))
            cosines.append(-alignment.loss(projections[0], wanted))
    for group in (latents, exact):
        group.close()
    run.data.close()
    return {"cosine": torch.cat(cosines).mean().item(), "denoising": torch.cat(denoising).mean().item()}


def _parts(n: int) -> Iterator[np.ndarray]:
    for start in range(0, n, BATCH):
        yield np.arange(start, min(n, start + BATCH), dtype=np.int64)


def measure(run: Run, group: str, args: argparse.Namespace) -> dict[str, float]:
    """What the table has of a run from a group; trained and measured once."""
    file = (args.measures or args.out / "measures") / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        folder = train(run, args.store, group, args.out, args.steps)
        measured = heldout(folder, args.heldout, args.features)
        probe = args.out / "probes" / run.name
        probe.parent.mkdir(parents=True, exist_ok=True)
        command(
            args.out / "commands.log",
            ["trainer", "probe", str(folder), "--features", args.features.removeprefix("features/"),
             "--n", str(args.probe), "--out", str(probe)],
        )  # fmt: skip
        curve = json.loads(probe.with_suffix(".json").read_text())
        measured["probe"] = max(point["probe"] for point in curve["points"])
        write_atomic(file, json.dumps(measured, indent=1).encode(), "code_training")
    measured = json.loads(file.read_text())
    return {name: float(value) for name, value in measured.items()}


def lines(measured: dict[Run, dict[str, float]], quantity: str) -> list[list[str]]:
    """Rows of a table: a method and a codec each."""
    rows = []
    for method in METHODS:
        for codec in (EXACT, *CODES):
            seeds = [seed for seed in SEEDS if Run(seed=seed, method=method, codec=codec) in measured]
            values = [measured[Run(seed=seed, method=method, codec=codec)][quantity] for seed in seeds]
            if not values:
                continue
            exact = [measured.get(Run(seed=seed, method=method, codec=EXACT), {}).get(quantity) for seed in seeds]
            differences = [value - of for value, of in zip(values, exact, strict=True) if of is not None]
            of_exact = exact_values(measured, method, quantity)
            spread = max(of_exact) - min(of_exact)
            beyond = ("yes" if abs(float(np.mean(differences))) > spread else "no") if len(of_exact) > 1 else "one seed"
            signs = f"{sum(d > 0 for d in differences)}+ {sum(d < 0 for d in differences)}−"
            mean = float(np.mean(differences))
            rows.append([
                method, codec, f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})",
                "" if codec == EXACT else f"{mean:+.4f}", "" if codec == EXACT else signs,
                "" if codec == EXACT else beyond,
            ])  # fmt: skip
    return rows


def exact_values(measured: dict[Run, dict[str, float]], method: str, quantity: str) -> list[float]:
    """Of the runs from float16, all seeds."""
    return [of[quantity] for run, of in measured.items() if (run.method, run.codec) == (method, EXACT)]


def write(measured: dict[Run, dict[str, float]], args: argparse.Namespace) -> str:
    """The tables, so far."""
    header = ["method", "targets", "mean (least to most)", "− float16, equal seeds", "signs", "beyond float16's spread"]
    titles = {
        "cosine": "Cosine to the exact features, held-out photographs",
        "denoising": "Denoising loss, held-out photographs",
        "probe": "Linear probe, best block",
    }
    text = ["## Training from codes", "", machine(args.out, ("torch", "numpy")), ""]
    options = " ".join(f"`{name} {value}`" for name, value in COMMON.items())
    text += [f"{args.steps} steps from {args.features}; {len(measured)} runs. {options}.", ""]
    for quantity, title in titles.items():
        text += [f"### {title}", "", table(header, lines(measured, quantity)), ""]
    written = "\n".join(text)
    (RESULTS / "code_training.md").write_text(written)
    return written


def main() -> None:
    """Train and measure what is missing, seed by seed; print the tables and write them to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="store to train on")
    parser.add_argument("--heldout", required=True, help="store of other photographs, of the same encoders")
    parser.add_argument("--features", required=True, help="group of float16 patch tokens, in both")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and measures")
    parser.add_argument("--measures", type=Path, help="folder of the measures (default: measures in --out)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--probe", type=int, default=2000, help="images of a probe")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = groups(args.store, args.features, args.out / "commands.log")
    measured: dict[Run, dict[str, float]] = {}
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    runs = [Run(seed=s, method=m, codec=c) for s in SEEDS for m in METHODS for c in (EXACT, *CODES)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for run, figures in zip(runs, pool.map(lambda run: measure(run, names[run.codec], args), runs), strict=True):
            measured[run] = figures
            print(run.name, figures, flush=True)
            write(measured, args)
    print(write(measured, args))


if __name__ == "__main__":
    main()
