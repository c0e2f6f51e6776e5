"""The report's charts: all points, axes that do not exaggerate, looks, and the same engine's figures as files."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.evaluation.report_runs import BATCH, EVERY, RATE, STEPS, evaluation, make_run, structure
from trainer.evaluation.probing.plots import Panel, Series, svg, write_figure
from trainer.evaluation.report.axes import LEAST_SHARE, Axis, axis_of, counted_axis, short, ticks
from trainer.evaluation.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_OF_ALL,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    drawn,
    figure,
    most_points,
    strip,
    thinned,
)
from trainer.evaluation.report.curves import Figure, figures, smoothed
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.table import ALWAYS, Cell, breakable, fits, table

NUMBERS = st.floats(-1e100, 1e100)


@pytest.fixture
def records(shared_tiny_store: Path, tmp_path: Path) -> list[RunRecord]:
    """Two methods of two seeds."""
    for name, weight in (("repa", 0.5), ("vanilla", 0.0)):
        for seed in (0, 1):
            make_run(tmp_path, shared_tiny_store, seed, weight, measured=True, name=f"{name}-seed{seed}")
    return read_runs([tmp_path])


def loss(records: list[RunRecord]) -> Figure:
    return next(each for each in figures(records, methods_of(records)) if each.title == "Denoising loss")


def places(path: str) -> list[tuple[float, float]]:
    points = [point.split(" ") for point in path.removeprefix("M").split("L")]
    return [(float(x), float(y)) for x, y in points]


# ---- axes -------------------------------------------------------------------------------------------------------


def test_ticks_and_numbers() -> None:
    assert ticks(0, 300) == [0, 100, 200, 300]
    assert ticks(0.113, 0.291) == pytest.approx([0.15, 0.2, 0.25])
    assert ticks(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    numbers = (0, 0.30000000000000004, 250, 9_999, 40_000, 400_000, 1_500_000, 2e9)
    assert [short(v) for v in numbers] == ["0", "0.3", "250", "9999", "40K", "400K", "1.5M", "2G"]


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_every_value_is_on_the_axis_and_its_ticks_are_few(values: list[float], log: bool, zero: bool) -> None:
    axis = axis_of(values, log=log, zero=zero)
    assert axis.low < axis.high
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert all(axis.low - abs(axis.low) * 1e-6 <= tick <= axis.high + abs(axis.high) * 1e-6 for tick in axis.ticks())
    assert len(axis.ticks()) <= 14
    assert not zero or axis.low <= 0 <= axis.high


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8))
def test_an_axis_does_not_exaggerate(values: list[float]) -> None:
    """It begins at zero, or a difference of 1 % takes no more than a tenth of it."""
    axis = axis_of(values)
    assert axis.begins_at_zero or axis.high - axis.low >= LEAST_SHARE * max(values) * 0.999


def test_an_axis_is_logarithmic_over_large_factors_only() -> None:
    assert axis_of([2, 300], log=True).log
    assert not axis_of([2, 30], log=True).log
    assert not axis_of([0, 300], log=True).log
    assert axis_of([0.03125, 1.0], log=True, zero=True).begins_at_zero, "a logarithmic one has no zero"
    assert Axis(low=1, high=100, log=True).place(10) == pytest.approx(0.5)
    assert axis_of([2, 300], log=True).ticks() == [2, 5, 10, 20, 50, 100, 200]
    assert counted_axis([10, 300]) == Axis(low=0, high=300)
    assert counted_axis([250, 300]) == Axis(low=250, high=300)
    label = drawn(
        Chart(title="", x_label="", y_label="FID", lines=[Line(label="", number=0, x=[1, 2], y=[2, 300])], log=True)
    )
    assert "FID, log scale" in label


# ---- points -----------------------------------------------------------------------------------------------------


def test_a_chart_has_every_point_of_every_line_inside_its_axes() -> None:
    rng = np.random.default_rng(0)
    lines = [
        Line(label=f"r{i}", number=i, x=list(range(50)), y=rng.normal(size=50).tolist(), low=[-4] * 50, high=[4] * 50)
        for i in range(11)
    ]
    text = drawn(Chart(title="t", x_label="step", y_label="y", lines=lines))
    paths = [places(path) for path in re.findall(r'class="line"[^>]* d="([^"]+)"', text)]
    assert len(paths) == 11
    for line, path in zip(lines, paths, strict=True):
        assert len(path) == 50
        down = np.array([y for _, y in path])
        assert np.corrcoef(down, line.y)[0, 1] < -0.999
    for path in [*paths, *(places(p[:-1]) for p in re.findall(r'class="band"[^>]* d="([^"]+)"', text))]:
        assert all(LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1 and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in path)


def test_long_lines_are_averaged_and_keep_their_end() -> None:
    line = Line(label="a", number=0, x=range(1, 1001), y=[1.0] * 500 + [3.0] * 500, base=range(1, 1001))
    few = thinned(line)
    assert len(few.x) == len(few.y) == len(few.base) <= MOST_POINTS
    assert few.x[-1] == few.base[-1] == 1000
    assert (few.y[0], few.y[-1]) == (1, 3)
    assert most_points(1) == MOST_POINTS
    assert most_points(60) * 60 <= MOST_OF_ALL


def test_the_values_beside_a_figure_are_those_drawn(records: list[RunRecord]) -> None:
    each = loss(records)
    html = figure(each.title, each.note, each.charts)
    structure(html)
    payload = re.search(r'<script type="application/json">(.*?)</script>', html)
    assert payload is not None
    of_runs = json.loads(payload[1])["logged"]
    assert of_runs["x"] == "step"
    for line, record in zip(of_runs["lines"], records, strict=True):
        assert line["label"] == record.name
        assert line["at"] == [logged.step for logged in record.lines]
        assert line["y"] == pytest.approx([logged.denoising_loss for logged in record.lines], rel=1e-4)
    assert html.count('class="look"') == len(each.charts)
    assert html.count("hidden>") == len(each.charts), "all but the first, and the pointer's note"


# ---- looks and axes of curves -----------------------------------------------------------------------------------


def test_curves_have_every_look_over_every_axis(records: list[RunRecord]) -> None:
    looks = ("methods", "smooth", "logged", "difference")
    axes = ("step", "images", "time", "device")
    charts = loss(records).charts
    assert set(charts) == set(itertools.product(axes, looks))
    line = charts["step", "logged"].lines[0]
    assert list(line.x) == list(range(EVERY, STEPS + 1, EVERY))
    for axis, factor, label in (
        ("images", BATCH, "images seen"),
        ("time", BATCH / RATE, "training time (s)"),
        ("device", 2 * BATCH / RATE, "time of all processes (s)"),
    ):
        other = charts[axis, "logged"].lines[0]
        assert charts[axis, "logged"].x_label == label
        assert list(other.x) == pytest.approx([x * factor for x in line.x])
        assert list(other.y) == list(line.y)
        assert list(other.base) == list(line.x), "the pointer names the step"


def test_methods_are_means_with_the_range_of_their_seeds(records: list[RunRecord]) -> None:
    charts = loss(records).charts
    repa, vanilla = charts["step", "methods"].lines
    assert (repa.label, vanilla.label) == ("repa", "vanilla")
    assert np.subtract(repa.high, repa.low) == pytest.approx(0.01)  # what seeds 0 and 1 differ by
    assert np.add(repa.high, repa.low) / 2 == pytest.approx(repa.y)


def test_a_difference_is_taken_at_equal_seeds(records: list[RunRecord]) -> None:
    chart = loss(records).charts["step", "difference"]
    (line,) = chart.lines
    assert line.label == "repa − vanilla"
    assert list(line.y) == pytest.approx([-0.01] * len(line.y))  # 0.5 of −0.02, at either seed
    assert np.subtract(line.high, line.low) == pytest.approx(0, abs=1e-12)
    assert "minus that of vanilla" in chart.y_label
    alone = [record for record in records if record.name in ("repa-seed0", "vanilla-seed1")]
    assert not any(look == "difference" for _, look in loss(alone).charts)


def test_smoothing_keeps_a_straight_line_and_takes_noise_away() -> None:
    steps = np.arange(100.0)
    assert smoothed((steps, 3 * steps))[1] == pytest.approx(3 * steps)
    noise = np.random.default_rng(0).normal(size=100)
    assert smoothed((steps, noise))[1].std() < 0.6 * noise.std()
    few = (steps[:5], noise[:5])
    assert smoothed(few) is few


def test_a_measure_at_several_steps_is_a_curve(records: list[RunRecord], tmp_path: Path) -> None:
    lines = [evaluation(90.0 / step, step=step) for step in (100, 200, 300)]
    other = evaluation(1.0, step=150, reference={"path": "/other", "digest": "9"})
    path = records[0].path / "evaluations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, other]))
    again = read_runs([tmp_path])
    (each,) = [each for each in figures(again, methods_of(again)) if each.title == "FID"]
    line = next(line for line in each.charts["step", "logged"].lines if line.label == records[0].name)
    assert list(line.x) == [100, 200, 300]
    assert list(line.y) == pytest.approx([0.9, 0.45, 0.3])


def test_a_curve_is_of_one_protocol(records: list[RunRecord], tmp_path: Path) -> None:
    """A guided point is not the end of an unguided line."""
    values = [(100, 20.0, 1.0), (200, 10.0, 1.0), (300, 1.9, 1.8), (200, 4.0, 1.8)]
    lines = [evaluation(fid, step=step, card={"guidance": guidance}) for step, fid, guidance in values]
    (records[0].path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    for n, expected in ((3, {"no guidance": [20, 10]}), (4, {"guidance 1.8": [4, 1.9], "no guidance": [20, 10]})):
        (records[0].path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:n]))
        again = read_runs([records[0].path])
        drawn = [each for each in figures(again, methods_of(again)) if each.title.startswith("FID")]
        found = {each.note.split("; ")[2]: list(each.charts["step", "logged"].lines[0].y) for each in drawn}
        assert found == expected
        assert all("known of none, and so perhaps different: weights, " in each.note for each in drawn)


# ---- tables -----------------------------------------------------------------------------------------------------


def test_tables_say_from_which_width_they_are_blocks() -> None:
    few = {"Run": [Cell(text="a")], "FID": [Cell(text="1.0")]}
    many = {f"A heading {i}": [Cell(text="12.345")] for i in range(30)}
    assert fits(few) == "480"
    assert fits(many) == ALWAYS
    assert 'class="fit-480 sortable"' in table(few, label="x")
    structure(table(many, label="<x>"))


@given(st.text(max_size=40))
def test_names_break_between_words_and_stay_what_they_are(text: str) -> None:
    found = structure(f"<p>{breakable(text)}</p>").text
    assert found == structure(f"<p>{breakable(text).replace('<wbr>', '')}</p>").text
    assert "<wbr>" not in breakable("word") + breakable("1.234,5") + breakable("−0.5") + breakable("-0.5")
    assert breakable("a-b_c.d") == "a-<wbr>b_<wbr>c.<wbr>d"
    assert breakable("a&b") == "a&amp;b"


# ---- files ------------------------------------------------------------------------------------------------------


def panel(**changes: object) -> Panel:
    long = "a run with a long name, of which there are many, " * 3
    series = [
        Series(label=f"{long}{i}", x=[1, 2, 3], y=[0.1 * i, 0.2, 0.4], group=i, style=style)
        for i, style in enumerate(("solid", "dashed", "dotted", "points"))
    ]
    fields = {"title": "A <title>", "x_label": "block", "y_label": "CKNNA", "series": series}
    return Panel(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_figure_is_a_file_of_its_own_whose_legend_covers_no_curve(tmp_path: Path) -> None:
    panels = [panel(levels=[(0.5, "features")]), panel(series=[], note="nothing\nhere"), panel(note="2 left out")]
    paths = write_figure(panels, tmp_path / "probe-t0.5", {"by": "probe"})
    assert [path.name for path in paths] == ["probe-t0.5.svg", "probe-t0.5.json"]
    root = ElementTree.fromstring(paths[0].read_text(encoding="utf-8"))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{name}path[@class='line']")) == 8
    text = "".join(root.itertext())
    for word in ("A <title>", "features", "nothing", "2 left out", "CKNNA"):
        assert word in text
    assert "var(" not in paths[0].read_text()
    width, height = (float(root.get(side) or 0) for side in ("width", "height"))
    assert (width, height) > (3 * WIDTH, HEIGHT)
    first = root.findall(f"{name}g")[0]
    axes, legend = first.findall(f"{name}g")
    down = float(re.findall(r"translate\(0 (\d+)\)", legend.get("transform") or "")[0])
    begins = float(re.findall(r"translate\(0 (\d+)\)", axes.get("transform") or "")[0])
    assert down >= begins + HEIGHT, "below the axes"
    lowest = max(float(text.get("y") or 0) for text in legend.findall(f"{name}text"))
    assert 4 + down + lowest + 6 < height, "what hangs below the last line is inside too"
    assert json.loads(paths[1].read_text())["panels"][0]["title"] == "A <title>"
    assert write_figure(panels, tmp_path / "x.svg", {})[0].name == "x.svg"


@given(st.text(max_size=30))
def test_a_figure_of_any_name_is_well_formed(text: str) -> None:
    whole = panel(title=text, series=[Series(label=text, x=[1.0], y=[math.pi], group=0)], levels=[(1.0, text)])
    ElementTree.fromstring(svg([whole]))


def test_a_strip_has_a_dot_a_seed() -> None:
    axis = axis_of([0, 10])
    assert strip([3.0, 4.0], axis, 0).count("<circle") == 2
    assert strip([3.0], axis, 0).count("<circle") == 0  # one value is the bar, and no interval is drawn about it
