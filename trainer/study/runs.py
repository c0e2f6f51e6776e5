"""`python -m trainer ablate`: the runs of an ablation that are missing, one after another or as tasks on a Ray cluster.

Features that the runs need and the store lacks are precomputed first, from the source that the store records; what is
there is never encoded again. Every stage is a command of its own, as a user would type it: nothing of the pipeline is
imported here. Ctrl-C lets the run in hand save and ends; the same command goes on. A run that fails is told of, and the
others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage import Store, StoreError, UserError, open_store
from storage.base.console import EXIT_FAILED, EXIT_OK, INTERRUPTS, Stop, say, stop_on_signals
from storage.base.ending import command, say_next
from storage.base.files import write_atomic
from storage.base.shown import shown
from storage.roots import absolute
from trainer.data.groups import geometry_of, open_data, require_guided_channels
from trainer.run.folder import RunFolder
from trainer.study.file import AblateConfig, Ablation, Run, read_ablation

POLL_S = 0.2
STOPPING = "stopping: the run in hand saves its state, the same command goes on; Ctrl-C again stops at once"
HERE = "local"  # as a Ray address: a cluster of this machine's own


def ablate(config: AblateConfig) -> int:
    """Run what is missing; returns the exit status. Raises UserError before anything runs, KeyboardInterrupt after."""
    folder = (config.out or Path("runs/ablations") / config.file.stem).absolute()
    store = absolute(config.store)
    named = config.ray_address if config.ray_address is not None else os.environ.get("RAY_ADDRESS", "")
    ray_address = named.strip()
    ablation = read_ablation(config.file, store, folder)
    opened = open_store(store)
    lacking = [name for name in ablation.features if not _has_features(opened, name)]
    say(*describe(ablation, folder, lacking).splitlines(), flush=True)
    address = "" if ray_address == HERE else ray_address
    with stop_on_signals(*INTERRUPTS, answer=STOPPING) as stop:
        if lacking:
            status = _attend(precompute_command(opened, ablation, lacking, address), stop)
            if status:
                return status
        for run in ablation.runs:
            _check(run)
        todo = [run for run in ablation.runs if not run.is_complete]
        failed = _on_ray(todo, ablation, folder, address, stop) if ray_address else _in_turn(todo, ablation, stop)
    n_done = len(ablation.runs) - len(failed)
    say(f"{n_done} of {len(ablation.runs)} runs are complete in {folder}")
    for name in failed:
        print(shown(f"failed: {name}, see {folder / name}"), file=sys.stderr)
    say_next(command("trainer", "report", folder, "--out", folder / "report.html"))
    return EXIT_FAILED if failed else EXIT_OK


def describe(ablation: Ablation, folder: Path, lacking: Sequence[str]) -> str:
    """What there is to do, a line a run."""
    lines = [f"{len(ablation.runs)} runs in {folder}"]
    for run in ablation.runs:
        state = "complete" if run.is_complete else f"step {run.steps_done} of {run.config.steps}"
        lines.append(f"  {run.name}  {state}")
    if lacking:
        lines.append(f"to precompute: {', '.join(lacking)}")
    return "\n".join(lines)


def precompute_command(store: Store, ablation: Ablation, lacking: Sequence[str], ray_address: str) -> list[str]:
    """The command line that adds features to the store, of its images, resolution, views and shards."""
    source = store.attributes.get("source", {})
    if not {"path", "kind"} <= source.keys():
        raise UserError(f"store {store.root} does not say what it was made of; precompute {', '.join(lacking)} first")
    options = {
        "data": source["path"],
        "source": source["kind"],
        "store": str(store.root),
        "latents": "none",
        "features": ",".join(ablation.encoders.get(name, name) for name in lacking),
        "resolution": str(store.resolution),
        "shard-rows": str(store.layout.shard_rows),
        "ray-address": ray_address,
        **ablation.precompute,
    }
    command = [sys.executable, "-m", "pipeline", "precompute"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [*command, "--flip"] if store.n_views > 1 else command


def train_command(run: Run, gpus: int) -> list[str]:
    """The command line of a run, on one rank or through torchrun."""
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command = [*launcher, "-m", *(["--"] if gpus > 1 else []), "trainer", "train"]
    options = {"preset": run.config.preset, "store": run.config.store, "run": str(run.config.run), **run.options}
    return command + [f"--{name.replace('_', '-')}={text}" for name, text in options.items()]


def _has_features(store: Store, name: str) -> bool:
    """Whether they are there and complete."""
    try:
        store.group(f"features/{name}").close()
    except StoreError:
        return False
    return True


def _check(run: Run) -> None:
    """Raises UserError when the store does not fit the run, before the runs ahead of it take their hours."""
    data = open_data(run.config)
    try:
        require_guided_channels(run.config, geometry_of(run.config, data))
    finally:
        data.close()


def _in_turn(runs: Sequence[Run], ablation: Ablation, stop: Stop) -> list[str]:
    """Train one after another; returns the names of those that failed."""
    failed = []
    for number, run in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}: {run.name}", flush=True)
        run.config.run.mkdir(parents=True, exist_ok=True)
        with open(RunFolder(run.config.run).log, "a", encoding="utf-8") as log:
            _attend(train_command(run, ablation.gpus), stop, stdout=log)
        if not run.is_complete:  # whatever its status: a run that is told to stop saves, and ends with 0
            failed.append(run.name)
    return failed


def _on_ray(runs: Sequence[Run], ablation: Ablation, folder: Path, ray_address: str, stop: Stop) -> list[str]:
    """Train as tasks of a cluster, whose machines share the runs' folder; returns the names of those that failed."""
    if not runs:
        return []
    tasks = [
        {
            "name": run.name,
            "command": train_command(run, ablation.gpus),
            "log": str(RunFolder(run.config.run).log),
            "gpus": ablation.gpus,
            "steps": run.config.steps,
            "metrics": str(RunFolder(run.config.run).metrics),
        }
        for run in runs
    ]
    listed = folder / "tasks.json"
    write_atomic(listed, json.dumps(tasks, indent=1).encode(), "ablate")
    _attend([sys.executable, "-m", "pipeline", "tasks", str(listed), f"--ray-address={ray_address}"], stop)
    return [run.name for run in runs if not run.is_complete]


def _attend(command: Sequence[str], stop: Stop, stdout: Any = None) -> int:
    """Run a command to its end and return its status; a signal to stop is handed on, and raised when it has ended."""
    # The command names its cluster, or none; a Ctrl-C reaches it once, from here.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stdout=stdout, env=environment, start_new_session=True)
    signalled = False
    try:
        while process.poll() is None:
            if stop.signal is not None and not signalled:
                process.send_signal(signal.SIGINT)
                signalled = True
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:  # Ctrl-C a second time
            process.terminate()
            process.wait()
    if stop.signal is not None:
        raise KeyboardInterrupt
    return process.returncode
