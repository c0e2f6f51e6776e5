"""Panels of lines side by side in one PNG. What is drawn is plain data, so that it is saved as JSON beside it.

matplotlib is imported inside the function that draws.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from storage.base.files import write_atomic

Style = Literal["solid", "dashed", "dotted", "points"]
PANEL_INCHES = (5.0, 4.0)
DOTS_PER_INCH = 150


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line. `group` chooses its colour: lines of one run are of one colour, and differ in their dashes."""

    label: str
    x: list[float]
    y: list[float]
    group: int
    style: Style = "solid"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes. `level` is a horizontal line (value, label); `note` stands where there is nothing to draw."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    levels: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    whole_x: bool = True  # blocks and steps are counted
    note: str = ""


def write_figure(panels: list[Panel], path: Path, record: dict[str, Any]) -> list[Path]:
    """Write PATH.png and PATH.json (the panels and `record`); returns both paths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in panel.series:
            points = series.style == "points"
            axes.plot(
                series.x,
                series.y,
                color=f"C{series.group % 10}",
                linestyle="none" if points else series.style,
                marker="o",
                markersize=6 if points else 3,
                label=series.label,
            )
        for value, label in panel.levels:
            axes.axhline(value, color="0.4", linestyle="dashdot", linewidth=1, label=label)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        if panel.whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.series or panel.levels:
            axes.legend(fontsize=7)
        if panel.note:
            y = 0.02 if panel.series else 0.5  # below the points, or in their place
            axes.text(0.5, y, panel.note, transform=axes.transAxes, ha="center", va="bottom", color="0.4", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.removesuffix(".png").removesuffix(".json")  # the name may have other points: probe-t0.5
    picture, data = path.with_name(f"{stem}.png"), path.with_name(f"{stem}.json")
    figure.savefig(picture, dpi=DOTS_PER_INCH)
    drawn = {**record, "panels": [dataclasses.asdict(panel) for panel in panels]}
    write_atomic(data, json.dumps(drawn, indent=1).encode(), "figure")
    return [picture, data]
