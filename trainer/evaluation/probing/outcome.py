"""What `probe` and `cknna` print: a line a time, with the block that is best there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
