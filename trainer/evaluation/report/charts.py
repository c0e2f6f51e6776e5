"""Line charts as inline SVG, for a page that loads nothing: axes and lines here, hovering in the page's script.

Coordinates are those of a picture WIDTH pixels wide, so that its text is readable on a phone. Colours are the page's
CSS variables, by which they follow light and dark.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage.base.shown import shown

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
TICKS = 5
MOST_POINTS = 240  # of a line; more are averaged
N_COLOURS = 8
DASHES = ("", "5 3", "1.5 2.5")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one run, ascending in x; `number` chooses colour and dashes."""

    label: str
    number: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one pair of axes. `note` says how all of them were measured."""

    title: str
    x_label: str
    lines: Sequence[Line]
    note: str = ""


def escaped(text: str) -> str:
    """Text for HTML, its control and bidirectional characters spelled out."""
    return html.escape(shown(text))


def colour(number: int) -> str:
    """The CSS colour of a run."""
    return f"var(--c{number % N_COLOURS})"


def dash(number: int) -> str:
    """The dashes that tell runs of one colour apart."""
    return DASHES[number // N_COLOURS % len(DASHES)]


def figure(chart: Chart) -> str:
    """HTML of a chart: heading, SVG, and its numbers as JSON for the script."""
    lines = [thinned(line) for line in chart.lines]
    x_low, x_high = _range([x for line in lines for x in line.x])
    y_low, y_high = _range([y for line in lines for y in line.y], margin=0.05)

    def at(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x_low) / (x_high - x_low), (y_high - y) / (y_high - y_low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(y_low, y_high):
        _, py = at(x_low, y)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(x_low, x_high):
        px, _ = at(x, y_low)
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(x)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escaped(chart.x_label)}</text>')
    data = []
    for line in lines:
        places = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        own = colour(line.number)
        parts.append(f'<path class="line" d="{path}" style="stroke:{own}" stroke-dasharray="{dash(line.number)}"/>')
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" style="fill:{own}"/>')
        points = [[x, y, round(px, 1), round(py, 1)] for (x, y), (px, py) in zip(_points(line), places, strict=True)]
        data.append({"label": shown(line.label), "colour": own, "points": points})
    title, note = escaped(chart.title), f"<small>{escaped(chart.note)}</small>" if chart.note else ""
    described = f"{title} over {escaped(chart.x_label)}, {len(lines)} lines; arrow keys read the values"
    payload = json.dumps({"x": chart.x_label, "lines": data}).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption>{title}{note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{described}">{"".join(parts)}'
        f'<line class="guide" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
        f'<div class="tip" role="status" hidden></div>'
        f'<script type="application/json">{payload}</script></figure>'
    )


def _points(line: Line) -> list[tuple[float, float]]:
    return list(zip(line.x, line.y, strict=True))


def thinned(line: Line) -> Line:
    """The line with at most MOST_POINTS points: means over equal runs of them, at the last one's x."""
    size = math.ceil(len(line.x) / MOST_POINTS)
    if size <= 1:
        return line
    cuts = range(0, len(line.x), size)
    means = [sum(line.y[i : i + size]) / len(line.y[i : i + size]) for i in cuts]
    ends = [line.x[min(i + size, len(line.x)) - 1] for i in cuts]
    return Line(label=line.label, number=line.number, x=ends, y=means)


def ticks(low: float, high: float) -> list[float]:
    """At most TICKS + 1 round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= TICKS)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 250, 400K, 0.05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}K"
    return f"{round(value, 10):g}"


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Ends of an axis, never equal."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    wider = (high - low) * margin if high - low > size * 1e-9 + 1e-90 else max(size, 1) * 0.5
    return low - wider, high + wider
