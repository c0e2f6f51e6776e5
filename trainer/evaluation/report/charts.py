"""Line charts as SVG: in the report, which loads nothing, and as files of their own (`analyse`, `probe`, `cknna`).

Axes, lines, bands and marks are drawn here; the report's script only shows one of a figure's charts and reads values
under the pointer. So a chart is the same with and without a script, on paper, in light and dark: on the page, colours
are CSS variables. A library was weighed: plotly's script alone is 4.8 MB of a page that should stay under 5, Bokeh's
1.3 MB draws on a canvas that follows no colour scheme, and needs a browser to make a picture; so does none of them.
Coordinates are those of a picture WIDTH pixels wide, so that its text is readable on a phone. Legends stand outside
the axes and cover no curve.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.base.shown import shown
from trainer.evaluation.report.axes import Axis, axis_of, counted_axis, short

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
MOST_POINTS = 200  # of a line; more are averaged
MOST_OF_ALL = 2400  # of all lines of a chart, so that a page of many runs stays small
LEAST_POINTS = 24
N_COLOURS = 8
DASHES = ("", "6 3", "2 2.5", "9 3 2 3")
MARKED = 16  # a line of fewer points shows each of them

Paint = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points ascending in x; `number` chooses colour and dashes, `low` and `high` are a band around it.

    `base` has what the pointer's note names instead of x where they differ: the step, of a line over hours. Points
    alone are drawn where `joined` is false.
    """

    label: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    base: Sequence[float] = ()
    joined: bool = True
    dashes: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one pair of axes. `note` says how they were measured, `levels` are horizontal lines."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    note: str = ""
    levels: Sequence[tuple[float, str]] = ()
    whole_x: bool = True
    from_zero: bool = True  # along x
    log: bool = False
    zero: bool = False


def escaped(text: str) -> str:
    """Text for HTML, its control and bidirectional characters spelled out."""
    return html.escape(shown(text))


def colour(number: int) -> str:
    """The CSS colour of a run."""
    return f"var(--c{number % N_COLOURS})"


def dash(number: int) -> str:
    """The dashes that tell runs of one colour apart."""
    return DASHES[number // N_COLOURS % len(DASHES)]


def swatch(number: int, dashes: str) -> str:
    """A piece of a run's line."""
    line = f'<line x1="1" x2="19" y1="5" y2="5" style="stroke:{colour(number)}" stroke-dasharray="{dashes}"/>'
    return f'<svg class="swatch" viewBox="0 0 20 10" aria-hidden="true">{line}</svg>'


def drawn(chart: Chart, paint: Paint = colour) -> str:
    """The inside of an SVG WIDTH × HEIGHT: axes, their labels, bands, lines."""
    x_axis = None
    if chart.whole_x:
        x_axis = counted_axis([x for line in chart.lines for x in line.x] or [1.0], from_zero=chart.from_zero)
    x_axis = x_axis or axis_of(x for line in chart.lines for x in line.x)
    y_axis = y_axis_of(chart)
    parts = [*_rules(x_axis, y_axis, chart)]
    at = _placing(x_axis, y_axis)
    for line in chart.lines:
        if line.low:
            edge = [at(x, y) for x, y in zip(line.x, line.high, strict=True)]
            edge += reversed([at(x, y) for x, y in zip(line.x, line.low, strict=True)])
            parts.append(f'<path class="band"{_mark(line)} d="M{_path(edge)}Z" style="fill:{paint(line.number)}"/>')
    for value, label in chart.levels:
        _, down = at(x_axis.low, value)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        text = f'<text class="level" x="{WIDTH - RIGHT}" y="{down - 4:.1f}" text-anchor="end">{escaped(label)}</text>'
        parts.append(text)
    for i, line in enumerate(chart.lines):
        places, own = [at(x, y) for x, y in zip(line.x, line.y, strict=True)], paint(line.number)
        dashes = dash(line.number) if line.dashes is None else line.dashes
        style = f'style="stroke:{own}" stroke-dasharray="{dashes}"' if line.joined else 'style="stroke:none"'
        parts.append(f'<path class="line"{_mark(line)} data-line="{i}" d="M{_path(places)}" {style}/>')
        if len(places) < MARKED or not line.joined:
            radius = 2.4 if line.joined else 4
            parts += [
                f'<circle{_mark(line)} cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:{own}"/>' for x, y in places
            ]
    return "".join(parts)


def y_axis_of(chart: Chart) -> Axis:
    """The axis up, of lines, bands and levels."""
    values = [y for line in chart.lines for part in (line.y, line.low, line.high) for y in part]
    return axis_of([*values, *(level for level, _ in chart.levels)] or [1.0], log=chart.log, zero=chart.zero)


def _placing(x_axis: Axis, y_axis: Axis) -> Callable[[float, float], tuple[float, float]]:
    def at(x: float, y: float) -> tuple[float, float]:
        right, up = x_axis.place(x), y_axis.place(y)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    return at


def _mark(line: Line) -> str:
    """By which the page's legend hides a line and all that belongs to it."""
    return f' data-n="{line.number}"'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _rules(x_axis: Axis, y_axis: Axis, chart: Chart) -> list[str]:
    at, parts = _placing(x_axis, y_axis), []
    for y in y_axis.ticks():
        _, down = at(x_axis.low, y)
        kind = "rule zero" if y == 0 else "rule"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_axis.ticks(whole=chart.whole_x):
        right, _ = at(x, y_axis.low)
        parts.append(f'<text x="{right:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(x)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escaped(chart.x_label)}</text>'
    )
    how = ", log scale" if y_axis.log else "" if y_axis.begins_at_zero else ", not from 0"
    parts.append(f'<text class="name" x="4" y="14">{escaped(chart.y_label)}{how}</text>')
    return parts


# ---- a figure of the page ---------------------------------------------------------------------------------------


def figure(title: str, note: str, charts: Mapping[tuple[str, str], Chart]) -> str:
    """HTML of one figure: charts of the same by (axis, look), of which the first is shown, and their values as JSON.

    The page's controls choose another; a figure that lacks what they choose shows the nearest that it has.
    """
    pictures: list[str] = []
    values: dict[str, dict[str, object]] = {}
    for (axis, look), chart in charts.items():
        few = replace(chart, lines=[thinned(line, most_points(len(chart.lines))) for line in chart.lines])
        described = (
            f"{escaped(title)} over {escaped(chart.x_label)}, {len(few.lines)} lines; arrow keys read the values"
        )
        hidden = " hidden" if pictures else ""
        how = f"<small>{escaped(chart.note)}</small>" if chart.note else ""
        pictures.append(
            f'<div class="look" data-axis="{axis}" data-look="{look}"{hidden}>{how}'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{described}">{drawn(few)}'
            f'<line class="guide" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg></div>'
        )
        values.setdefault(look, _values(few))
    heading, small = escaped(title), f"<small>{escaped(note)}</small>" if note else ""
    payload = json.dumps(values).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption>{heading}{small}</figcaption>{"".join(pictures)}'
        f'<div class="tip" role="status" hidden></div><script type="application/json">{payload}</script></figure>'
    )


def _values(chart: Chart) -> dict[str, object]:
    lines = [
        {
            "label": shown(line.label),
            "colour": colour(line.number),
            "at": [round(x, 4) for x in line.base or line.x],
            "y": [float(f"{y:.5g}") for y in line.y],
        }
        for line in chart.lines
    ]
    return {"x": "step" if any(line.base for line in chart.lines) else chart.x_label, "lines": lines}


def most_points(n_lines: int) -> int:
    """How many points each of so many lines may have."""
    return max(LEAST_POINTS, min(MOST_POINTS, MOST_OF_ALL // max(1, n_lines)))


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """The line with at most so many points: means over equal runs of them, at the last one's x."""
    size = math.ceil(len(line.x) / most)
    if size <= 1:
        return line
    ends = [min(i + size, len(line.x)) - 1 for i in range(0, len(line.x), size)]

    def means(values: Sequence[float]) -> list[float]:
        return [sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])]

    return replace(
        line,
        x=[line.x[end] for end in ends],
        y=means(line.y),
        low=means(line.low),
        high=means(line.high),
        base=[line.base[end] for end in ends] if line.base else (),
    )


# ---- a row of values, for a table -------------------------------------------------------------------------------

STRIP_WIDTH, STRIP_HEIGHT = 220, 26


def strip(values: Sequence[float], axis: Axis, number: int) -> str:
    """Every value as a dot on `axis`, their mean as a bar."""

    def at(value: float) -> float:
        return 6 + min(1.0, max(0.0, axis.place(value))) * (STRIP_WIDTH - 12)

    own, middle = colour(number), STRIP_HEIGHT / 2
    parts = [f'<line class="rule" x1="6" x2="{STRIP_WIDTH - 6}" y1="{middle}" y2="{middle}"/>']
    mean = at(sum(values) / len(values))
    parts.append(
        f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="3" y2="{STRIP_HEIGHT - 3}" style="stroke:{own}"/>'
    )
    if len(values) > 1:
        parts += [
            f'<circle cx="{at(v):.1f}" cy="{middle}" r="3.6" style="fill:{own};fill-opacity:.5;stroke:{own}"/>'
            for v in values
        ]
    return f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'
