"""Ctrl-C and SIGTERM end a command with status 130 and one line, whenever they come and whatever swallows them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from storage.base.console import stop_on_signals
from storage.base.errors import MOST, StoreError

SLEEPS = """
def main(argv):
    print("ready", flush=True)
    time.sleep(60)
    return 0
"""
SWALLOWED = """
class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # the handler runs here, and what it raises is lost

def main(argv):
    print("ready", flush=True)
    Finalised()
    return 0
"""
SWALLOWED_BEFORE_THE_LOOP = SWALLOWED.replace(
    "    return 0",
    """
    with stop_on_signals(signal.SIGINT) as stop:
        while stop.signal is None:
            time.sleep(0.01)
    return 0
""",
)
RUN = """
import os, signal, sys, time
from storage.base.console import run_command, stop_on_signals
{main}
run_command(main, "python -m test", [])
"""


def command(main: str, **options: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(main=main)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def require_interrupted(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("python -m test: interrupted; what was finished is kept")


@pytest.mark.parametrize(
    ("number", "ignored"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_also_where_a_script_had_it_ignored(number: signal.Signals, ignored: bool) -> None:
    before = signal.signal(number, signal.SIG_IGN) if ignored else None
    try:
        process = command(SLEEPS)
    finally:
        if before is not None:
            signal.signal(number, before)
    process.send_signal(number)
    require_interrupted(process)


@pytest.mark.parametrize("main", [SWALLOWED, SWALLOWED_BEFORE_THE_LOOP])
def test_a_ctrl_c_that_was_swallowed_still_counts(main: str) -> None:
    require_interrupted(command(main))


def _interrupted_sleep() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


def test_ctrl_c_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals(signal.SIGINT, answer="stopping after this step") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        while stop.signal is None:
            time.sleep(0.001)
        assert capfd.readouterr().err == "\nstopping after this step\n", "before the work has ended"
        with pytest.raises(KeyboardInterrupt):  # a second one does not wait
            _interrupted_sleep()


def test_a_message_longer_than_a_screen_keeps_its_rule_and_its_fix() -> None:
    message = f"the name {'A' * 100_000} is not allowed; rename it"
    said = str(StoreError(message))
    assert len(said) <= MOST
    assert said.startswith("the name AAA")
    assert said.endswith("AAA is not allowed; rename it")
    assert "characters) …" in said
    assert str(StoreError("a" * MOST)) == "a" * MOST
