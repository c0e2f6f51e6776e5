"""Panels of lines side by side in one SVG file. What is drawn is plain data, so that it is saved as JSON beside it.

Axes and lines are those of the report (`report/charts.py`). A panel's legend stands below it, a line a label, and
covers no curve. Colours are written out, on white, since few programs but browsers know variables.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from storage.base.files import write_atomic
from trainer.evaluation.report.charts import HEIGHT, LEFT, N_COLOURS, WIDTH, Chart, Line, drawn, escaped

Style = Literal["solid", "dashed", "dotted", "points"]
DASHES: dict[Style, str] = {"solid": "", "dashed": "6 3", "dotted": "2 2.5", "points": ""}
COLOURS = ("#2563eb", "#c2570c", "#047857", "#c81e4a", "#7c3aed", "#0e7490", "#8a5a00", "#57606a")
GAP, TITLE, ROW, LETTERS = 24, 24, 16, 60  # pixels between panels, of a title, of a line of a legend; letters of one
TEXT_STYLE = """
text { font: 11.5px sans-serif; fill: #3c4043; } text.name { fill: #1c1e21; }
text.title { font-size: 13px; font-weight: bold; fill: #1c1e21; }
.rule { stroke: #dfe2e6; } .rule.zero { stroke: #5a616b; }
line.level { stroke: #5a616b; stroke-dasharray: 7 3 2 3; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
"""
NOT_XML = {0xFFFE: "?", 0xFFFF: "?"}  # characters that no XML file may hold


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
    """Write PATH.svg and PATH.json (the panels and `record`); returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\.(svg|png|json)$", "", path.name)  # the name may have other points: probe-t0.5
    picture, data = path.with_name(f"{stem}.svg"), path.with_name(f"{stem}.json")
    write_atomic(picture, svg(panels).encode(), "figure")
    written = {**record, "panels": [dataclasses.asdict(panel) for panel in panels]}
    write_atomic(data, json.dumps(written, indent=1).encode(), "figure")
    return [picture, data]


def svg(panels: list[Panel]) -> str:
    """The file's text."""
    legends = [_legend(panel) for panel in panels]
    width = len(panels) * (WIDTH + GAP) - GAP + 16
    height = TITLE + HEIGHT + 20 + max(rows for _, rows in legends) * ROW
    parts = []
    for i, (panel, (legend, _)) in enumerate(zip(panels, legends, strict=True)):
        title = f'<text class="title" x="4" y="14">{_text(panel.title)}</text>'
        axes = f'<g transform="translate(0 {TITLE})">{_axes(panel)}</g>'
        below = f'<g transform="translate(0 {TITLE + HEIGHT + 8})">{legend}</g>'
        parts.append(f'<g transform="translate({i * (WIDTH + GAP) + 8} 4)">{title}{axes}{below}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{TEXT_STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def _axes(panel: Panel) -> str:
    lines = [
        Line(
            label=series.label,
            number=series.group,
            x=series.x,
            y=series.y,
            joined=series.style != "points",
            dashes=DASHES[series.style],
        )
        for series in panel.series
        if series.x
    ]
    levels = [(value, _plain(label)) for value, label in panel.levels]
    if not lines and not levels:
        rows = panel.note.split("\n")
        return "".join(
            f'<text x="{WIDTH / 2}" y="{HEIGHT / 2 + i * ROW}" text-anchor="middle">{_text(row)}</text>'
            for i, row in enumerate(rows)
        )
    chart = Chart(
        title=panel.title,
        x_label=panel.x_label,
        y_label=panel.y_label,
        lines=lines,
        levels=levels,
        whole_x=panel.whole_x,
        from_zero=False,
    )
    return drawn(chart, paint)


def paint(number: int) -> str:
    """The colour of a run."""
    return COLOURS[number % N_COLOURS]


def _legend(panel: Panel) -> tuple[str, int]:
    """A line and a label a series, then the panel's note; and how many rows they take."""
    parts, row = [], 0
    for series in panel.series:
        down, own = row * ROW + 8, paint(series.group)
        if series.style == "points":
            parts.append(f'<circle cx="{LEFT + 12}" cy="{down}" r="4" style="fill:{own}"/>')
        else:
            mark = f'style="stroke:{own}" stroke-width="2.4" stroke-dasharray="{DASHES[series.style]}"'
            parts.append(f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{down}" y2="{down}" {mark}/>')
        for line in textwrap.wrap(_plain(series.label), LETTERS) or [""]:
            parts.append(f'<text x="{LEFT + 32}" y="{row * ROW + 12}">{_text(line)}</text>')
            row += 1
    if panel.series:
        for line in filter(None, panel.note.split("\n")):
            parts.append(f'<text x="{LEFT}" y="{row * ROW + 12}">{_text(line)}</text>')
            row += 1
    return "".join(parts), row


def _plain(text: str) -> str:
    return text.translate(NOT_XML)


def _text(text: str) -> str:
    return escaped(_plain(text))
