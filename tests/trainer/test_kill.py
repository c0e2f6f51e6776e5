"""A run that is killed thirty times, at any moment, and started again each time is the run that was left alone."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from storage.base.console import EXIT_INTERRUPTED
from tests.trainer.runs import assert_same_run, command, curve, start
from trainer.run.metrics import read_metrics

STEPS = 300


def steps_done(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run)), default=0)


def ended(process: object) -> str:
    return f"{process.args} ended with {process.returncode}: {process.communicate()}"  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_kills_leave_no_trace(shared_tiny_store: Path, tmp_path: Path) -> None:
    """Every third kill comes early, while the run imports, opens and restores; the others after a few more steps."""
    rng = random.Random(0)
    changes = {"steps": STEPS, "checkpoint.every": 7, "log.every": 3}
    start_s = time.monotonic()
    whole = start(command(shared_tiny_store, tmp_path / "whole", **changes))
    while not steps_done(tmp_path / "whole") and whole.poll() is None:
        time.sleep(0.01)
    early_s = time.monotonic() - start_s
    assert whole.wait(timeout=600) == 0
    run = tmp_path / "killed"
    argv = command(shared_tiny_store, run, **changes)
    n_killed = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    for number in range(30):
        before = steps_done(run) if run.exists() else 0
        process = start(argv)
        if number % 3 == 0:
            time.sleep(rng.uniform(0.1, 1) * early_s)
        else:
            target = before + rng.randint(1, 12)
            deadline = time.monotonic() + 120
            while steps_done(run) < min(target, STEPS) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
        which = rng.choice([signal.SIGKILL, signal.SIGTERM])
        if process.poll() is not None:
            assert process.returncode == 0, ended(process)
            break  # the run is over before the kills are
        process.send_signal(which)
        process.communicate(timeout=120)
        # A SIGTERM that comes before the loop listens ends the command with 130, or Python while it imports.
        ends = (-signal.SIGKILL,) if which == signal.SIGKILL else (0, EXIT_INTERRUPTED, -signal.SIGTERM)
        assert process.returncode in ends
        n_killed[which] += 1
    process = start(argv)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    print(f"{n_killed[signal.SIGKILL]} SIGKILLs, {n_killed[signal.SIGTERM]} SIGTERMs")
    assert sum(n_killed.values()) >= 25
    assert len(curve(run)) == STEPS // 3
    assert_same_run(tmp_path / "whole", run)
