"""What REPA does to training, measured on real photographs with a real encoder, along training, at equal steps.

    python -m benchmarks.repa_effect --data TRAIN --heldout HELDOUT --vae FOLDER --encoder dinov2-vits14:layer=8 \
        --final dinov2-vits14 --encoder-weights FILE [--second-weights FILE.pth] --out FOLDER [--measures FOLDER] \
        [--jobs 2] [--minutes 60]

TRAIN and HELDOUT are what `python -m pipeline precompute --data` takes, FOLDER an autoencoder of them
(`benchmarks/photo_vae.py`). Both become stores with flips. Then every arm of `effect/arms.py` trains to the first
milestone, is measured there (`effect/measure.py`), and goes on to the next, so that what is there compares whenever the
work is stopped. With `--run-by-run` a run is brought to its end before the next begins, first seeds first: on machines
that are lent for a while, what `--measures` has from another one is neither trained for nor measured again.

Weights, order, noise, times and dropped labels of the arms of one seed are equal, since all are keyed by the seed: a
difference within a pair is the alignment's. What is stopped half-way is REPA's own run until then, and goes on from its
checkpoint, where the run is at hand.

- vanilla and REPA with a middle block's features, three seeds each
- one seed each: REPA with the final norm's features; with a middle block's of another photograph of the same class, a
  control that must not help as much; stopped half-way; iREPA; REG with the
  final norm's features and with the middle block's
- half as long, without images, to find out why the gain is as large as it is: REPA with another weight, another block,
  a wider projector; vanilla and REPA of 9 M parameters

`--scale base` is the same with SiT-B/2 at 256 px, without the last; its measures and results stand apart. Everything
but the held-out loss, the second encoder and `--without-ray` is a command that a user types. All of it goes on where
it was after any kill; SIGTERM, Ctrl-C and the end of `--minutes` let the commands in hand save. Results so far are
written by `--report` alone, too. Cost: some ten hours of two cores to the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.effect.arms import SCALES, Arm, Run, arms, interleaved, variants
from benchmarks.effect.control import is_whole, write_control
from benchmarks.effect.measure import Setting, is_measured, machines, measure, note_machines_of, write_references
from benchmarks.effect.report import write_report
from benchmarks.report import RESULTS
from pipeline.encoders.registry import resolve_features
from storage.base.console import Parser, run_command
from storage.base.errors import UserError
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder

PROG = "python -m benchmarks.repa_effect"
MILESTONES = (1000, 2000, 3000, 4000, 6000, 8000)
DRAWN_AT = (2000, 4000, 8000)  # images of other milestones would cost more than the training
SAVED_EVERY = 250  # steps that a kill loses at most
CONTROL = "other-photograph"
POLL_S = 0.5


class StoppedError(Exception):
    """The work was told to end."""


class Commands:
    """Runs modules as commands, each on `threads` threads; all end when told to."""

    def __init__(self, log: Path, threads: int, deadline_s: float) -> None:
        self.log, self.deadline_s = log, deadline_s
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.told = threading.Event()

    def stop(self, *signal_and_frame: object) -> None:
        """Let every command save and end, and start no other."""
        self.told.set()

    def __call__(self, arguments: Sequence[str]) -> None:
        """Run `python -m …`. Raises StoppedError, or UserError when it fails."""
        if self.is_over:
            raise StoppedError
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {' '.join(arguments)}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
            told = False
            while process.poll() is None:
                if self.is_over and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(POLL_S)
        if told:
            raise StoppedError
        if process.returncode:
            raise UserError(f"{' '.join(arguments[:3])} ended with status {process.returncode}; see {self.log}")

    @property
    def is_over(self) -> bool:
        """Whether the work is to end."""
        return self.told.is_set() or time.monotonic() > self.deadline_s


def train_command(run: Run, arm: Arm, setting: Setting, step: int, every: int) -> list[str]:
    """The trainer's command line to a step; a larger one goes on. Checkpoints of multiples of `every` are kept."""
    options = {
        **setting.common,
        **arm.options,
        "seed": str(run.seed),
        "steps": str(step),
        "store": str(setting.train_store),
        "run": str(setting.out / "runs" / run.name),
        "checkpoint.every": str(math.gcd(every, SAVED_EVERY)),
        "checkpoint.keep": "1",
        "checkpoint.milestone-every": str(every),
    }
    return ["trainer", "train", *(f"--{name}={value}" for name, value in options.items())]


def stage(run: Run, arm: Arm, setting: Setting, step: int, milestones: Sequence[int], command: Commands) -> None:
    """Train one run to one milestone and measure it there; nothing that is there is done again."""
    draws = not arm.variant and (step in DRAWN_AT or step == max(milestones))
    if is_measured(setting, run.name, step, draws=draws):
        return
    folder = setting.out / "runs" / run.name
    words = train_command(run, arm, setting, step, math.gcd(*milestones))
    if arm.begins_as is not None:
        other, until = arm.begins_as
        origin = Run(arm=other, seed=run.seed)
        if step <= until and is_measured(setting, origin.name, step, draws=draws):
            shutil.copytree(setting.folder(origin.name, step), setting.folder(run.name, step), dirs_exist_ok=True)
            note_machines_of(setting, run.name, origin.name)
            return
        if step > until and begin_as(folder, setting.out / "runs" / origin.name, until):
            words.append("--resume-with-changes")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None or read_state(checkpoint).step < step:
        command(words)
    measure(setting, folder, step, command, draws=draws)


def begin_as(run: Path, origin: Path, step: int) -> bool:
    """Let `run` go on from `origin`'s checkpoint at a step, unless it is beyond it; whether it begins there."""
    there, kept = latest_checkpoint(run), RunFolder(origin).checkpoint(step)
    if (there is not None and read_state(there).step > step) or not kept.is_dir():
        return False
    mine = RunFolder(run)
    run.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, mine.checkpoint(step), dirs_exist_ok=True)
    for name in (RunFolder(origin).config.name, RunFolder(origin).metrics.name):
        shutil.copy(origin / name, run / name)
    mine.latest.write_text(mine.checkpoint(step).name)
    return True


def stage_one(args: argparse.Namespace, setting: Setting, of_arms: Mapping[str, Arm], command: Commands) -> None:
    """Both stores, with what the arms align with, and the references."""
    aligned_with = {arm.options.get("data.features") for arm in of_arms.values()}
    final = [args.final] if resolve_features(args.final).store_name in aligned_with else []
    features = ",".join(dict.fromkeys((args.encoder, *final)))
    program = "benchmarks.without_ray" if args.without_ray else "pipeline"
    for data, store in ((args.data, setting.train_store), (args.heldout, setting.heldout_store)):
        weights = [f"--features-weights={args.encoder_weights}"] if args.encoder_weights else []
        command(
            [program, "precompute", "--data", data, "--store", str(store), "--latents", str(args.vae), "--features",
             features, "--resolution", str(args.resolution), "--flip", *weights]
        )  # fmt: skip
    if CONTROL in aligned_with and not is_whole(setting.train_store, CONTROL):
        write_control(setting.train_store, setting.features, CONTROL)
    write_references(setting, command)


def work(
    setting: Setting,
    of_arms: Mapping[str, Arm],
    milestones: Sequence[int],
    jobs: int,
    command: Commands,
    *,
    run_by_run: bool = False,
) -> list[str]:
    """Every stage in turn, `jobs` at once, one at a time of each run; returns what failed."""
    order = interleaved(of_arms, tuple(milestones))
    tasks = [[each] for each in order]
    if run_by_run:  # one worker brings a run to its end, so that no other waits for it
        runs = dict.fromkeys(run for _, run in order)
        tasks = [[each for each in order if each[1] == run] for run in runs]
    locks = {run: threading.Lock() for _, run in order}
    failed: dict[Run, str] = {}

    def do(step: int, run: Run) -> None:
        with locks[run]:
            if run in failed or command.is_over:
                return
            try:
                stage(run, of_arms[run.arm], setting, step, milestones, command)
                print(f"{time.strftime('%H:%M:%S')} {run.name} measured at step {step:,}", flush=True)
            except StoppedError:
                return
            except (UserError, OSError) as error:
                failed[run] = f"{run.name}: {error}"
                print(failed[run], file=sys.stderr, flush=True)

    def do_all(stages: Sequence[tuple[int, Run]]) -> None:
        for step, run in stages:
            do(step, run)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(do_all, stages) for stages in tasks]:
            future.result()
    return list(failed.values())


def main(argv: Sequence[str]) -> int:
    """Work, then report; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images to train on")
    parser.add_argument("--heldout", required=True, help="images of the same classes to measure on")
    parser.add_argument("--vae", type=Path, required=True, help="diffusers folder of the autoencoder")
    parser.add_argument("--encoder", default="dinov2-vits14:layer=8", help="vision encoder of the arms `repa`")
    parser.add_argument("--final", default="dinov2-vits14", help="the encoder to its last layer, of `repa-final`")
    parser.add_argument("--encoder-weights", type=Path, help="their weight file")
    parser.add_argument("--second-weights", type=Path, help="EfficientNet-Lite0's weights; without, one distance only")
    parser.add_argument("--resolution", type=int, help="default: 128, and 256 at --scale base")
    parser.add_argument("--out", type=Path, required=True, help="folder of stores, runs and measures")
    parser.add_argument("--scale", choices=SCALES, default="small", help="base: SiT-B/2, without the variants")
    parser.add_argument("--without-ray", action="store_true", help="make the stores in one process, where no Ray is")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3, help="at most so many of each arm")
    parser.add_argument("--milestones", type=int, nargs="+", default=list(MILESTONES))
    parser.add_argument("--images", type=int, default=2000, help="images drawn for a Fréchet distance")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many, and save")
    parser.add_argument("--measures", type=Path, help="folder of the measures (default: measures in --out)")
    parser.add_argument("--run-by-run", action="store_true", help="every run to its end before the next")
    parser.add_argument("--report", action="store_true", help="write the results that are there, and end")
    parser.add_argument("--results", type=Path, help="results, without suffix")
    args = parser.parse_args(argv)
    is_small = args.scale == "small"
    args.resolution = args.resolution or (128 if is_small else 256)
    results = args.results or RESULTS / ("repa_effect" if is_small else "repa_effect_base")
    measures = (args.measures or args.out / "measures").absolute()
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    features, final = (resolve_features(name).store_name for name in (args.encoder, args.final))
    of_arms = {**arms(features, final, CONTROL), **(variants(features) if is_small else {})}
    if unknown := set(args.arms or ()) - of_arms.keys():
        parser.error(f"--arms {' '.join(sorted(unknown))}: the arms of --scale {args.scale} are {', '.join(of_arms)}")
    of_arms = {
        name: dataclasses.replace(of_arms[name], seeds=of_arms[name].seeds[: args.seeds])
        for name in args.arms or of_arms
    }
    setting = Setting(
        out=out,
        train_store=out / "train",
        heldout_store=out / "heldout",
        features=features,
        encoder=args.encoder,
        encoder_weights=args.encoder_weights,
        second_weights=args.second_weights,
        n_images=args.images,
        common=SCALES[args.scale],
        measures=measures if is_small else measures / args.scale,  # nothing of the other is taken for it
    )
    failed: list[str] = []
    if not args.report:
        command = Commands(out / "commands.log", args.threads, time.monotonic() + args.minutes * 60)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, command.stop)
        try:
            stage_one(args, setting, of_arms, command)
            failed = work(setting, of_arms, args.milestones, args.jobs, command, run_by_run=args.run_by_run)
        except StoppedError:
            pass
    runs = [Run(arm=name, seed=seed).name for name, arm in of_arms.items() for seed in arm.seeds]
    about = [*machines(setting.measures, runs), "", *_about(args)]
    print(write_report(results, setting.measures, of_arms, "REPA against vanilla on real photographs", about))
    return 1 if failed else 0


def _about(args: argparse.Namespace) -> list[str]:
    options = " ".join(f"`{name} {value}`" for name, value in SCALES[args.scale].items())
    return [
        "What it says, and how to go on: [docs/photographs.md](../../docs/photographs.md).",
        "",
        f"Features: {args.encoder}; final layer: {args.final}. {args.images:,} images a Fréchet distance, which falls "
        "with their number too. Several seeds: mean (least to most).",
        f"Options of every run, unless its arm says otherwise (benchmarks/effect/arms.py): {options}.",
    ]


if __name__ == "__main__":
    run_command(main, PROG)
