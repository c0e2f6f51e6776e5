"""What `probe`, `cknna` and `analyse` print: a line a time, or a run, with the block that is best there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from storage.base import ending
from trainer.evaluation.probing.sweep import Measure

NAMES: dict[Measure, str] = {"probe": "linear probe", "cknna": "CKNNA"}


def best_blocks(measured: Mapping[str, Any], measure: Measure) -> str:
    """The best block of the newest step at every time, and what the features themselves reach in a probe."""
    step = max(point["step"] for point in measured["points"])
    newest = [point for point in measured["points"] if point["step"] == step]
    rows = []
    for t in sorted({point["t"] for point in newest}):
        best = max((point for point in newest if point["t"] == t), key=lambda point: float(point[measure]))
        rows.append((f"t = {t:g}", f"{best[measure]:.4f}", f"after block {best['block']} of {measured['depth']}"))
    if measure in measured["features"]:
        rows.append(("features", f"{measured['features'][measure]:.4f}", measured["features"]["path"]))
    head = f"{NAMES[measure]} of {measured['name']}, step {step}, {measured['n']} images"
    width = max(len(row[0]) for row in rows)
    return "\n".join([head, *(f"{name:<{width}}  {value}  {where}" for name, value, where in rows)])


def best_of_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """The best block of each run's newest step, of either measure, at the time at which it is best."""
    lines = {}
    for run in runs:
        step = max(point["step"] for point in run["points"])
        parts = []
        for measure, name in NAMES.items():
            found = [point for point in run["points"] if point["step"] == step and measure in point]
            if found:
                best = max(found, key=lambda point: float(point[measure]))
                parts.append(f"{name} {best[measure]:.4f} after block {best['block']} at t = {best['t']:g}")
        lines[str(run["name"])] = f"step {step}, {run['n']} images: {'; '.join(parts)}"
    return ending.rows(lines)
