"""Chains of trainer commands that run beside each other, a chain for each run, with the cores shared out.

Commands of a small model hardly gain from a second core, and drawing images on a CPU uses one only: two chains on two
cores take little longer than one of them alone. What a command says goes to its chain's log; the terminal says what is
at work, and gets a line when a command is through, and the log's end when one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from storage.base.console import say
from storage.base.waiting import waiting

POLL_S = 0.2
TAIL = 20  # lines of a log that are shown when its command fails
THREADS = "OMP_NUM_THREADS"


@dataclass
class _Chain:
    """What is left to run of a chain, and the command at work."""

    name: str
    left: deque[list[str]]
    log: Path
    writes: IO[bytes]
    process: subprocess.Popen[bytes] | None = None
    doing: str = ""
    since_s: float = field(default_factory=time.perf_counter)

    def begin(self, threads: int) -> None:
        arguments = self.left.popleft()
        self.doing, self.since_s = arguments[0], time.perf_counter()
        environment = {THREADS: str(threads), **os.environ}
        command = [sys.executable, "-m", "trainer", *arguments]
        self.process = subprocess.Popen(command, stdout=self.writes, stderr=self.writes, env=environment)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.writes.close()


def side_by_side(chains: Mapping[str, Sequence[Sequence[str]]], logs: Path) -> None:
    """Run every chain's trainer commands in turn, all chains at once; their output is in LOGS/NAME.log.

    Ends the process with a failed command's status, having shown the end of its log and stopped the other chains.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // len(chains))
    running: list[_Chain] = []
    try:
        for name, commands in chains.items():
            log = logs / f"{name}.log"
            running.append(_Chain(name, deque(list(command) for command in commands), log, log.open("wb")))
        for chain in running:
            chain.begin(threads)
        _wait(running, threads)
    finally:
        for chain in running:
            chain.end()


def _wait(running: Sequence[_Chain], threads: int) -> None:
    """Begin what comes next of a chain whenever a command ends, until none is left."""
    while at_work := [chain for chain in running if chain.process is not None]:
        with waiting(f"at work: {', '.join(f'{chain.name}: {chain.doing}' for chain in at_work)}"):
            while all(chain.process is None or chain.process.poll() is None for chain in at_work):
                time.sleep(POLL_S)
        for chain in at_work:
            status = None if chain.process is None else chain.process.poll()
            if status is None:
                continue
            if status:
                say(*chain.log.read_text(errors="replace").splitlines()[-TAIL:])
                say(f"{chain.name}: {chain.doing} failed; all that it said is in {chain.log}")
                sys.exit(status if status > 0 else 128 - status)
            say(f"{chain.name}: {chain.doing} took {time.perf_counter() - chain.since_s:.0f} s", flush=True)
            chain.process = None
            if chain.left:
                chain.begin(threads)
