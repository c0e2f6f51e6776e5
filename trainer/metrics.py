"""What a run reports: `metrics.jsonl` always, TensorBoard beside it, a progress bar on the terminal.

A line holds means over the log interval, not one step's luck. After a resume, lines beyond the checkpoint are dropped,
so each step is there once; the interval's sums are in the checkpoint, so a resumed curve equals an unbroken one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.files import write_atomic

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines and TensorBoard points; made on the main rank only."""

    def __init__(self, run: Path, *, from_step: int, tensorboard: bool) -> None:
        self._path = run / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= from_step]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode(), "metrics")
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 — closed by close()
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """One line; every number but the step is a TensorBoard scalar too."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines written so far; a last line that a crash cut short is left out."""
    lines = []
    path = run / METRICS_FILE
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
