"""Command lines as Ray tasks: they run on a cluster, their failures are told, and Ctrl-C lets them save."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SAVES = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
def save(*_):
    out.with_suffix(".saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
import trainer, storage
out.with_suffix(".started").touch()
time.sleep(float(sys.argv[2]))
out.with_suffix(".metrics").write_text('{"step": 5}')
"""


def tasks(folder: Path, seconds: list[float]) -> Path:
    listed = [
        {
            "name": f"task-{i}",
            "command": [sys.executable, "-c", SAVES, str(folder / f"task-{i}"), str(s)],
            "log": str(folder / f"task-{i}.log"),
            "gpus": 1,
            "steps": 5,
            "metrics": str(folder / f"task-{i}.metrics"),
        }
        for i, s in enumerate(seconds)
    ]
    path = folder / "tasks.json"
    path.write_text(json.dumps(listed))
    return path


def start(listed: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "tasks", str(listed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_tasks_run_and_a_failure_is_told(tmp_path: Path) -> None:
    listed = tasks(tmp_path, [0.1, 0.1])
    content = json.loads(listed.read_text())
    content[1]["command"] = [sys.executable, "-c", "print('words'); raise SystemExit(3)"]
    listed.write_text(json.dumps(content))
    done = start(listed)
    _, said = done.communicate(timeout=250)
    assert done.returncode == 1, said
    assert "task-0: done" in said
    assert "task-1: status 3" in said
    assert (tmp_path / "task-1.log").read_text() == "words\n"
    assert (tmp_path / "task-0.metrics").exists()


@pytest.mark.slow
def test_an_interrupt_reaches_every_command_and_is_waited_for(tmp_path: Path) -> None:
    listed = tasks(tmp_path, [1000.0, 1000.0])
    stopped = start(listed)
    deadline_s = time.monotonic() + 200
    while len(list(tmp_path.glob("*.started"))) < 2:
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    try:
        _, said = stopped.communicate(timeout=100)
    finally:
        stopped.kill()
    assert stopped.returncode == 130, said
    assert len(list(tmp_path.glob("*.saved"))) == 2
    assert not listed.with_suffix(".stop").exists()


def test_a_file_that_lists_no_tasks_is_refused(tmp_path: Path) -> None:
    from pipeline.launching.tasks import run_tasks
    from storage.base.errors import UserError

    for text in ("{", "[{}]"):
        (tmp_path / "tasks.json").write_text(text)
        with pytest.raises(UserError, match="is no list of tasks"):
            run_tasks(tmp_path / "tasks.json", "")
