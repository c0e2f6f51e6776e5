"""`python -m pipeline tasks`: command lines as Ray tasks, each on GPUs of its own. What they do is not known here.

A file lists them: name, command, log, gpus, and what its progress is read from (steps in all, a file of JSON lines with
a `step`). Machines share the paths. A task runs its command in a process of its own. On Ctrl-C every one gets SIGTERM
(SIGINT is blocked below a Ray worker), by way of a file that the tasks look for, and the driver waits for them, so that
what can save does. Ray tries none a second time: the commands are those that go on when they are run again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster.connection import ray_cluster
from storage.base.boundary import Count, open_regular, parse_json, read_regular
from storage.base.console import EXIT_FAILED, EXIT_OK, INTERRUPTS, progress_bar, stop_on_signals
from storage.base.errors import UserError

POLL_S = 0.5
STOPPING = "stopping the tasks, which save their state"
END_BYTES = 1 << 16  # of a file of metrics, of which only the last line is looked at


@dataclass(frozen=True)
class _Line:
    step: Count


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command line and what it needs."""

    name: str
    command: list[str]
    log: str
    gpus: int
    steps: int
    metrics: str

    @property
    def steps_done(self) -> int:
        """The last step that its metrics tell of."""
        try:
            with os.fdopen(open_regular(self.metrics), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
                last = file.read(END_BYTES).splitlines()[-1]
            return min(self.steps, parse_json(_Line, last, self.metrics, "remove the line").step)
        except (OSError, IndexError, UserError):  # not there yet, or in the middle of a line
            return 0


def run_tasks(listed: Path, ray_address: str) -> int:
    """Run every task of the file; returns the exit status. Raises UserError, and KeyboardInterrupt after Ctrl-C."""
    try:
        tasks = parse_json(
            list[Task], read_regular(listed), str(listed), "it is no list of tasks, as `ablate` writes one"
        )
    except OSError as error:
        raise UserError(f"{listed} is no list of tasks ({error})") from error
    stop_file = listed.with_suffix(".stop")
    stop_file.unlink(missing_ok=True)
    with ray_cluster(ray_address, verbose=False, packages=["trainer"]):
        try:
            return _run(tasks, stop_file)
        finally:
            stop_file.unlink(missing_ok=True)


def _run(tasks: list[Task], stop_file: Path) -> int:
    n_gpus = int(ray.cluster_resources().get("GPU", 0))
    widest = max((task.gpus for task in tasks), default=0)
    if 0 < n_gpus < widest:
        raise UserError(f"a task needs {widest} GPUs and the cluster has {n_gpus}; lower gpus in the ablation file")
    remote: Any = ray.remote(num_cpus=1, max_retries=0)(run_command_line)
    started_s = time.monotonic()
    running = {
        remote.options(num_gpus=task.gpus if n_gpus else 0).remote(task.command, task.log, str(stop_file)): task
        for task in tasks
    }
    total, failed = sum(task.steps for task in tasks), 0
    with (
        stop_on_signals(*INTERRUPTS, answer=STOPPING) as stop,
        progress_bar(total, unit="step", done=sum(t.steps_done for t in tasks), description="tasks") as bar,
    ):
        while running:
            if stop.signal is not None:
                stop_file.touch()
            done, _ = ray.wait(list(running), timeout=POLL_S)
            for ref in done:
                task = running.pop(ref)
                outcome = _outcome(ref)
                failed += outcome != "done"
                bar.write(f"{task.name}: {outcome} after {time.monotonic() - started_s:.0f} s", file=sys.stderr)
            bar.update(sum(task.steps_done for task in tasks) - bar.n)
            bar.set_postfix_str(f"{len(running)} of {len(tasks)} to go", refresh=False)
    if stop.signal is not None:
        raise KeyboardInterrupt
    return EXIT_FAILED if failed else EXIT_OK


def _outcome(ref: Any) -> str:
    try:
        status = ray.get(ref)
    except RayError as error:
        return f"lost ({str(error).splitlines()[0]})"
    return "done" if status == 0 else f"status {status}"


def run_command_line(command: list[str], log: str, stop_file: str) -> int:
    """Run a command, its output at the end of `log`; returns its status. On a worker."""
    if os.path.exists(stop_file):
        return -signal.SIGTERM
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        signalled = False
        while process.poll() is None:
            if not signalled and os.path.exists(stop_file):
                process.send_signal(signal.SIGTERM)
                signalled = True
            time.sleep(POLL_S)
    return process.returncode
