"""A training step, side by side: from a store, from memory, with the encoders in the loop, and REPA's public step.

    python -m benchmarks.train_step [--public ../REPA] [--vae] [--presets sit-b-2,sit-xl-2] [--batches 32,256]
    python -m benchmarks.train_step --presets sit-xl-2,sit-xl-2:irepa,sit-xl-2-reg,lightningdit-xl-1     the methods
    python -m benchmarks.train_step --device cpu --presets sit-tiny-2 --batches 4 --encoder dinov2-vits14 --compile no

    store        ours from a store on disk, of random numbers at real size, written first and read from the page cache
    ceiling      ours with the batch on the GPU already: what no data path can beat
    online       ours with DINOv2 in every step, on images that are on the GPU already
    online+vae   and SD-VAE's encoder (--vae)
    public       REPA's own step, from a clone (--public); see public_repa.py

Ours is the trainer's own step, with and without compiled blocks; models are presets, or methods as `methods.py` spells
them. Online, a method without features has no rows, and latents of factor 16 have no VAE; one that learns an encoder's
tokens (RiT, DiT^DH) has that encoder in the loop, whatever --encoder says. For each model and batch, one
process holds ours and one the public model; rounds go through all variants in turn, each timed for --seconds after
three steps untimed. Figures are medians over rounds. MFU counts the transformer alone, three times its forward pass,
over the GPU's dense bf16 peak. Stall is the share of time that a step waited for its batch. `store / this` is how many
times faster ours from the store is (compiled with compiled, the public step with the better of ours), the median of the
ratios within a round; beside it, the ratio of the FLOPs. Memory is the most that was allocated, weights included. A
batch that does not fit is taken in micro-batches. After each model and batch the table is written anew to
--out/train_step.md.

`--profile VARIANT` times nothing and writes, for each model and batch, the operations by time and a trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import LEARNT, measured_step, method, step_flops
from benchmarks.online import ENCODERS, vae_flops, vision_flops
from benchmarks.random_store import count_places, features_path, write
from benchmarks.report import RESULTS, machine, table
from benchmarks.step_worker import RESULT, Request, Task
from storage.base.console import EXIT_OK, run_command
from storage.base.errors import UserError
from storage.codecs import CODECS
from trainer.config.schema import TrainConfig
from trainer.ranks.arithmetic import peak_flops
from trainer.ranks.world import world_of_ranks

PROG = "python -m benchmarks.train_step"
PACKAGES = ("torch", "triton", "numpy", "timm", "diffusers", "accelerate")
OURS = ("store", "ceiling", "online", "online+vae")
HEADER = ("model, images a GPU", "step", "images/s", "MFU", "stall", "peak GB", "micro-batches", "store / this",
          "by FLOPs")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured."""

    variant: str
    compiled: bool

    @property
    def name(self) -> str:
        """As the table spells it."""
        return f"{self.variant}, compiled" if self.compiled else self.variant


class Worker:
    """A process of `step_worker.py`."""

    def __init__(self, task: Task) -> None:
        command = [sys.executable, "-m", "benchmarks.step_worker", json.dumps(dataclasses.asdict(task))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: Request) -> dict[str, Any]:
        """The answer, or why there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": f"its process has ended with {self.process.wait()}"}
        for line in self.process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        return {"failed": f"its process ended with {self.process.wait()}"}

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch, with what is known of them before anything is run."""

    preset: str
    batch: int
    args: argparse.Namespace

    @property
    def name(self) -> str:
        """As the table spells it."""
        return f"{self.preset}, {self.batch}"

    @property
    def config(self) -> TrainConfig:
        """Of the method."""
        return method(self.preset)

    @property
    def has_public(self) -> bool:
        """Whether the public step is of this model, and asked for."""
        model, plain = self.config.model, ":" not in self.preset and self.config.aligns
        return bool(self.args.public) and plain and model.kind == "sit" and model.patch > 1 and not model.class_token

    @property
    def encoder(self) -> str:
        """What runs online: where the model learns an encoder's tokens, that one."""
        return LEARNT.get(self.config.model.kind) or str(self.args.encoder)

    @property
    def features(self) -> str:
        """The store's group of that encoder's width."""
        return features_path(ENCODERS[self.encoder][1], widths_of(self.args))

    def rows(self) -> list[Row]:
        """What is measured, ours first."""
        modes = {"both": (True, False), "yes": (True,), "no": (False,)}[self.args.compile]
        variants = list(OURS[:2])
        if self.config.model.kind in LEARNT:
            variants += ["online"]
        elif self.config.aligns_at(measured_step(self.config)):
            variants += ["online"] + ["online+vae"] * (self.args.vae and self.config.model.patch > 1)
        rows = [Row(variant=variant, compiled=compiled) for compiled in modes for variant in variants]
        return rows + ([Row(variant="public", compiled=False)] if self.has_public else [])

    def workers(self, store: Path) -> dict[bool, Worker]:
        """One for ours and, if asked for, one for the public step (True)."""
        task = Task(
            preset=self.preset, batch=self.batch, store=str(store), encoder=self.encoder, device=self.args.device,
            features=self.features,
        )  # fmt: skip
        public = {True: dataclasses.replace(task, public=str(self.args.public))} if self.has_public else {}
        return {is_public: Worker(each) for is_public, each in ({False: task} | public).items()}

    def flops(self) -> int:
        """Forward and backward pass of one image."""
        return step_flops(self.config, ENCODERS[self.encoder][1])

    def arithmetic(self, variant: str) -> float:
        """How many times the FLOPs of ours from the store."""
        extra = vision_flops(self.encoder) if variant in ("online", "online+vae", "public") else 0
        extra += vae_flops() if variant == "online+vae" else 0
        return (self.flops() + extra) / self.flops()


def widths_of(args: argparse.Namespace) -> list[int]:
    """Of the features that the store holds: the encoder's, and of what models learn that learn tokens."""
    learnt = [LEARNT[kind] for name in args.presets if (kind := method(name).model.kind) in LEARNT]
    return list(dict.fromkeys(ENCODERS[name][1] for name in (args.encoder, *learnt)))


def measure(case: Case, store: Path) -> list[list[str]]:
    """Lines of the table."""
    workers = case.workers(store)
    rows = case.rows()
    rounds: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    failures: dict[Row, str] = {}
    try:
        for number in range(case.args.rounds + 1):  # the first warms all up, and finds what fits the memory
            for row in [row for row in rows if row not in failures]:
                request = Request(
                    variant=row.variant, compiled=row.compiled, seconds=case.args.seconds if number else 0.0
                )
                start_s = time.perf_counter()
                found = workers[row.variant == "public"].ask(request)
                if "failed" in found:
                    failures[row] = found["failed"]
                    tell(f"{case.name}: {row.name} failed: {found['failed']}")
                elif number:
                    rounds[row].append(found)
                else:
                    tell(f"{case.name}: {row.name} warm after {time.perf_counter() - start_s:.0f} s")
    finally:
        for worker in workers.values():
            worker.close()
    return [
        [case.name, row.name, f"failed: {failures[row]}", *["–"] * (len(HEADER) - 3)]
        if row in failures
        else [case.name, row.name, *figures(case, row, rounds)]
        for row in rows
    ]


def figures(case: Case, row: Row, rounds: dict[Row, list[dict[str, Any]]]) -> list[str]:
    """The numbers of one row."""
    of = {name: statistics.median(found[name] for found in rounds[row]) for name in rounds[row][0]}
    on_gpu = case.args.device == "cuda"
    peak = peak_flops(torch.device("cuda", 0)) if on_gpu else None
    mfu = f"{case.flops() * of['images_per_s'] / peak:.1%}" if peak else "–"
    memory = f"{of['peak_bytes'] / 1e9:.2f}" if on_gpu else "–"
    stall = f"{of['stall']:.1%}" if row.variant == "store" else "–"
    return [
        f"{of['images_per_s']:,.1f}", mfu, stall, memory, f"{of['micro_batches']:.0f}", ratio(row, rounds),
        f"{case.arithmetic(row.variant):.2f}",
    ]  # fmt: skip


def ratio(row: Row, rounds: dict[Row, list[dict[str, Any]]]) -> str:
    """Images a second of ours from the store, over this row's."""
    stores = [other for other in rounds if other.variant == "store" and len(rounds[other]) == len(rounds[row])]
    if row.variant != "public":
        stores = [other for other in stores if other.compiled == row.compiled]
    ratios = [
        statistics.median(
            a["images_per_s"] / b["images_per_s"] for a, b in zip(rounds[store], rounds[row], strict=True)
        )
        for store in stores
    ]
    return f"{max(ratios):.3f}" if ratios else "–"


def write_profile(case: Case, store: Path) -> None:
    """The profile of one variant, compiled unless `--compile no`."""
    row = next((row for row in case.rows() if row.variant == case.args.profile), None)
    if row is None:
        raise UserError(f"--profile {case.args.profile} is not measured; pass --public DIR, or --vae, with it")
    stem = case.args.out / f"profile-{case.preset.replace(':', '-')}-{case.batch}-{row.name.replace(', ', '-')}"
    workers = case.workers(store)
    try:
        request = Request(variant=row.variant, compiled=row.compiled, seconds=0.0, profile=str(stem))
        found = workers[row.variant == "public"].ask(request)
    finally:
        for worker in workers.values():
            worker.close()
    if "failed" in found:
        raise UserError(f"{case.name}: {row.name} failed: {found['failed']}")
    print(Path(f"{stem}.txt").read_text())


def report(args: argparse.Namespace, store: Path, lines: list[list[str]], left_out: list[str]) -> str:
    """The Markdown text."""
    device = torch.cuda.get_device_name(0) if args.device == "cuda" else "CPU"
    text = [
        "## A training step", "", f"{device}; {machine(store, PACKAGES)}", "",
        f"Encoder {args.encoder}, {args.dtype} features in a store of {args.rows} rows; medians of {args.rounds} "
        f"rounds of {args.seconds:g} s.", "",
        table(HEADER, lines), "",
    ]  # fmt: skip
    if left_out:
        text += [f"Left out, for want of time (--minutes {args.minutes:g}): {'; '.join(left_out)}.", ""]
    return "\n".join(text)


def tell(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default="sit-b-2,sit-l-2,sit-xl-2", help="models: PRESET or PRESET:CHANGE")
    parser.add_argument("--batches", default="32,256", help="images a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", choices=("both", "yes", "no"), default="both", help="ours: compiled blocks")
    parser.add_argument("--encoder", choices=ENCODERS, default="dinov2-vitb14", help="what runs online")
    parser.add_argument("--vae", action="store_true", help="SD-VAE in the loop as well, in rows of their own")
    parser.add_argument("--public", type=Path, help="a clone of REPA's public repository")
    parser.add_argument("--rounds", type=int, default=3, help="rounds through all variants (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timed run (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no model and batch is begun after so many")
    parser.add_argument(
        "--rows", type=int, default=4096, help="of the store (default 4096: 1.8 GB in float16, and what models learn)"
    )
    parser.add_argument("--dtype", choices=tuple(CODECS), default="float16", help="of the stored features")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the store is made (default here)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table and profiles are written")
    parser.add_argument("--profile", choices=(*OURS, "public"), help="write a profile of this variant, and no table")
    args = parser.parse_args(argv)
    args.presets = args.presets.split(",")
    args.batches = [int(batch) for batch in args.batches.split(",")]
    for name in args.presets:
        method(name)
    if args.rounds < 1 or min(args.batches) < 1:
        raise UserError(f"--rounds and --batches must be at least 1, got {args.rounds} and {min(args.batches)}")
    if args.rows < 2 * max(args.batches):
        raise UserError(f"--rows must be two batches at least, {2 * max(args.batches)}, got {args.rows}")
    with world_of_ranks(args.device) as world:
        args.device = world.device.type
    return args


def main(argv: Sequence[str]) -> int:
    """Write the store, measure every case, print and save the table."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [Case(preset=name, batch=batch, args=args) for batch in args.batches for name in args.presets]
    start_s = time.perf_counter()
    lines: list[list[str]] = []
    left_out: list[str] = []
    folder = Path(tempfile.mkdtemp(dir=args.directory, prefix=".bench-"))
    try:
        store = folder / "store"
        write(store, args.rows, widths_of(args), args.dtype)
        for path in {case.features for case in cases if case.config.model.kind in LEARNT}:
            count_places(store, path)
        tell(f"store of {args.rows} rows written in {time.perf_counter() - start_s:.0f} s")
        for case in cases:
            if args.profile:
                write_profile(case, store)
            elif time.perf_counter() - start_s > 60 * args.minutes:
                left_out.append(case.name)
            else:
                lines += measure(case, store)
                (args.out / "train_step.md").write_text(report(args, folder, lines, left_out))
        if not args.profile:
            text = report(args, folder, lines, left_out)
            (args.out / "train_step.md").write_text(text)
            print(text)
    finally:
        shutil.rmtree(folder)
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
