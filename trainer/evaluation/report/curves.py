"""Curves over training, each over several axes and in several looks, and what was measured over depth.

Axes are steps, images seen, time, and time of all devices together. Looks:

    methods      the mean over a method's seeds, and a band from the lowest seed to the highest; smoothed
    smooth       every run, the mean over neighbouring lines of the log
    logged       every run, as it was logged
    difference   a method less another one at equal seeds and equal steps, the mean over seeds and its band; smoothed

Losses of like methods overlap, and what tells them apart is smaller than a loss's noise: hence the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.probing.measured import Point
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.alike import Evaluated, Group, Protocol, evaluated, evaluated_alike, measured_alike
from trainer.evaluation.report.cards import drawn_in_words
from trainer.evaluation.report.charts import Chart, Line, figure
from trainer.evaluation.report.measures import better, decides, measured, title
from trainer.evaluation.report.methods import Method, equal_seeds, style_of
from trainer.evaluation.report.run_record import RunRecord, Spent
from trainer.evaluation.report.settings import UNITS
from trainer.run.metrics import DistanceOf

LOSSES = {"denoising_loss": "Denoising loss", "alignment_loss": "Alignment loss"}
LOSS_LABELS = {"denoising_loss": "mean squared error", "alignment_loss": "alignment loss"}
LOSSES_IN_WORDS = {
    "denoising_loss": "mean squared error of what the model predicts of noisy latents, mean over a log interval; lower "
    "is better, and says little of how good images are",
    "alignment_loss": "minus the mean cosine of projected hidden states and the target's tokens, before its weight; "
    "lower is more alike, at best −1",
}
ANALYSES_IN_WORDS = {
    "probe": "share of images whose class a logistic regression on a block's hidden states names; higher is better",
    "cknna": "how alike hidden states and the features are: alignment of kernels over pairs of images that are near "
    "neighbours in both; higher is more alike, at best 1, and values of other numbers of samples do not compare",
}
ANALYSES = {"probe": "Linear probe", "cknna": "CKNNA"}
ANALYSIS_LABELS = {"probe": "accuracy", "cknna": "CKNNA"}
LOOKS = {
    "methods": "Methods (mean of seeds)",
    "smooth": "Runs, smoothed",
    "logged": "Runs, as logged",
    "difference": "Difference at equal seeds",
}
SMOOTHED = 0.04  # of a curve's points, on either side
LEAST_SMOOTHED = 20  # a curve of fewer points stays as it is

Curve = tuple[np.ndarray, np.ndarray]  # steps ascending, values


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """What a curve is drawn over: a label, and its value of what a run has spent."""

    label: str
    of: Callable[[Spent], float]
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A title, a note, and charts by (axis, look)."""

    title: str
    note: str
    charts: dict[tuple[str, str], Chart]


def axes(records: Sequence[RunRecord]) -> dict[str, XAxis]:
    """The axes that say something of the runs, steps first."""
    found = {
        "step": XAxis(label="step", of=lambda spent: spent.step),
        "images": XAxis(label="images seen", of=lambda spent: spent.images),
    }
    seconds = max((record.spent[-1].seconds for record in records), default=0.0)
    device_seconds = max((record.spent[-1].device_seconds for record in records), default=0.0)
    if seconds > 0:
        size, unit = _unit(seconds)
        found["time"] = XAxis(label=f"training time ({unit})", of=lambda spent: spent.seconds / size, whole=False)
        gpus = {record.on_gpu for record in records if record.lines}
        several = any(line.ranks > 1 for record in records for line in record.lines)
        if gpus == {True}:
            found["device"] = XAxis(label="GPU-hours", of=lambda spent: spent.device_seconds / 3600, whole=False)
        elif several:
            long, name = _unit(device_seconds)
            label = f"time of all processes ({name})"
            found["device"] = XAxis(label=label, of=lambda spent: spent.device_seconds / long, whole=False)
    return found


def _unit(seconds: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in UNITS if seconds >= 1.5 * size), UNITS[-1])


def figures(records: Sequence[RunRecord], methods: Sequence[Method]) -> list[Figure]:
    """Everything that there is to draw."""
    over = axes(records)
    drawn = [_of_loss(records, methods, over, name) for name in LOSSES]
    drawn += _of_distances(records, methods, over)
    drawn += _of_evaluations(records, methods, over)
    drawn += _of_depth(records, methods)
    return [figure for figure in drawn if figure.charts]


def shown(drawn: Sequence[Figure]) -> str:
    """HTML of figures."""
    return "".join(figure(each.title, each.note, each.charts) for each in drawn)


# ---- over training ----------------------------------------------------------------------------------------------


def _of_loss(records: Sequence[RunRecord], methods: Sequence[Method], over: dict[str, XAxis], name: str) -> Figure:
    curves: dict[int, Curve] = {}
    for i, run in enumerate(records):
        logged = {line.step: value for line in run.lines if (value := getattr(line, name)) is not None}
        if logged and (run.config.aligns or name != "alignment_loss"):
            steps = sorted(logged)
            curves[i] = np.array(steps, dtype=float), np.array([logged[step] for step in steps])
    return Figure(
        title=LOSSES[name],
        note=LOSSES_IN_WORDS[name],
        charts=_charts(records, methods, over, curves, LOSS_LABELS[name], LOSSES[name]),
    )


def _charts(
    records: Sequence[RunRecord],
    methods: Sequence[Method],
    over: dict[str, XAxis],
    curves: dict[int, Curve],
    y_label: str,
    title: str,
    *,
    log: bool = False,
) -> dict[tuple[str, str], Chart]:
    """Charts of curves by run, over every axis in every look that applies; the first is the one to begin with."""
    if not curves:
        return {}
    smooth = {i: smoothed(curve) for i, curve in curves.items()}
    is_smoothed = any(len(curve[0]) >= LEAST_SMOOTHED for curve in curves.values())
    looks: dict[str, tuple[list[Line], str, str]] = {}
    if any(sum(i in curves for i in method.runs) > 1 for method in methods):
        note = "mean of each method's seeds, band from the lowest to the highest" + ", smoothed" * is_smoothed
        looks["methods"] = (_method_lines(methods, smooth), note, y_label)
    runs = {"smooth": smooth} if is_smoothed else {}
    for look, of in {**runs, "logged": curves}.items():
        note = f"mean of {2 * _reach(max(len(curve[0]) for curve in curves.values())) + 1} lines of the log"
        lines = [_run_line(records, methods, i, curve) for i, curve in of.items()]
        looks[look] = (lines, note if look == "smooth" else "", y_label)
    differing, base = _differences(records, methods, smooth)
    if differing:
        note = f"a method's minus that of {base}, at the same seed and step: below 0 it is the lower one"
        looks["difference"] = (differing, note, f"{y_label}, minus that of {base}")
    charts = {}
    for look, (lines, note, label) in looks.items():
        for key, axis in over.items():
            charts[key, look] = Chart(
                title=title,
                x_label=axis.label,
                y_label=label,
                lines=[_over(records, methods, line, axis) for line in lines],
                note=note,
                whole_x=axis.whole,
                log=log and look != "difference",
                zero=look == "difference",
            )
    return charts


def smoothed(curve: Curve) -> Curve:
    """Centred means over neighbouring points, of as many on either side at the ends as there are."""
    steps, values = curve
    reach = _reach(len(values))
    if not reach:
        return curve
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    span = np.minimum(reach, np.minimum(i, len(values) - 1 - i))
    return steps, (sums[i + span + 1] - sums[i - span]) / (2 * span + 1)


def _reach(n: int) -> int:
    return max(1, round(SMOOTHED * n)) if n >= LEAST_SMOOTHED else 0


def _run_line(records: Sequence[RunRecord], methods: Sequence[Method], i: int, curve: Curve) -> Line:
    number, dashes = style_of(methods, i)
    return Line(label=records[i].name, number=number, x=curve[0].tolist(), y=curve[1].tolist(), dashes=dashes)


def _method_lines(methods: Sequence[Method], curves: dict[int, Curve]) -> list[Line]:
    lines = []
    for method in methods:
        of_runs = [curves[i] for i in method.runs if i in curves]
        if of_runs:
            steps, values = _at_common_steps(of_runs)
            lines.append(_band(method.name, method.number, steps, values))
    return [line for line in lines if line.x]


def _band(label: str, number: int, steps: np.ndarray, values: np.ndarray) -> Line:
    """The mean over rows of values (seeds, steps), with a band where there are several."""
    several = len(values) > 1
    return Line(
        label=label,
        number=number,
        x=steps.tolist(),
        y=values.mean(0).tolist() if len(steps) else [],
        low=values.min(0).tolist() if several and len(steps) else (),
        high=values.max(0).tolist() if several and len(steps) else (),
    )


def _at_common_steps(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The first curve's steps that all of them reach, and every curve's values there (curves, steps)."""
    low, high = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    steps = curves[0][0]
    steps = steps[(steps >= low) & (steps <= high)]
    return steps, np.stack([np.interp(steps, *curve) for curve in curves])


def _differences(
    records: Sequence[RunRecord], methods: Sequence[Method], curves: dict[int, Curve]
) -> tuple[list[Line], str]:
    """Every method less the one to compare with, at equal seeds; and that one's name."""
    drawn = [method for method in methods if any(i in curves for i in method.runs)]
    if len(drawn) < 2:
        return [], ""
    plain = [method for method in drawn if not records[method.runs[0]].config.aligns]
    base = plain[0] if len(plain) == 1 else drawn[0]
    lines = []
    for method in drawn:
        pairs = [(a, b) for a, b in equal_seeds(records, method, base) if a in curves and b in curves]
        if method is base or not pairs:
            continue
        of_pairs = []
        for a, b in pairs:
            steps, (mine, its) = _at_common_steps([curves[a], curves[b]])
            if len(steps):
                of_pairs.append((steps, mine - its))
        if of_pairs:
            steps, values = _at_common_steps(of_pairs)
            line = _band(f"{method.name} − {base.name}", method.number, steps, values)
            lines += [line] if line.x else []
    return lines, base.name


def _over(records: Sequence[RunRecord], methods: Sequence[Method], line: Line, axis: XAxis) -> Line:
    """A line over steps as one over another axis, of the run of its name or the mean over its method's runs."""
    of_run = [record for record in records if record.name == line.label]
    method = next((method for method in methods if method.number == line.number), methods[0])
    runs = of_run or [records[i] for i in method.runs]
    x = [float(np.mean([axis.of(run.spent_at(step)) for run in runs])) for step in line.x]
    return Line(**{**vars(line), "x": x, "base": line.x})


def _of_distances(records: Sequence[RunRecord], methods: Sequence[Method], over: dict[str, XAxis]) -> list[Figure]:
    """What `--log.distance-every` measured, a figure for all runs that were measured alike."""
    ways: dict[DistanceOf, dict[int, dict[int, float]]] = {}
    for i, record in enumerate(records):
        for line in record.distances:
            if line.distance_of is not None and line.frechet_distance is not None:
                ways.setdefault(line.distance_of, {}).setdefault(i, {})[line.step] = line.frechet_distance
    drawn = []
    for of, runs in ways.items():
        curves = {
            i: (np.array(sorted(at), dtype=float), np.array([at[step] for step in sorted(at)]))
            for i, at in runs.items()
        }
        text = f"Fréchet distance while training ({of.extractor})"
        worth = f"; {of.images:,} images do not determine a covariance of {of.width:,} features, so it is far too large"
        note = (
            f"{of.images:,} images of averaged weights ({of.drawn}) against {of.n_reference:,}; lower is better"
            f"{worth * (of.images <= of.width)}; to watch a training by, not to publish"
        )
        charts = _charts(records, methods, over, curves, "Fréchet distance", text, log=True)
        drawn.append(Figure(title=text, note=note, charts=charts))
    return drawn


def _of_evaluations(records: Sequence[RunRecord], methods: Sequence[Method], over: dict[str, XAxis]) -> list[Figure]:
    """Measures of images over training: a figure for each way of measuring by which a run was measured at two steps."""
    drawn = []
    for name, metric in measured(records):
        if not decides(metric):
            continue
        ways = evaluated_alike(records, name, metric)
        for group in ways:
            curves = _evaluated_curves(records, group)
            if any(len(curve[0]) > 1 for curve in curves.values()):
                is_first = group is ways[0]
                text = title(metric, name) + ("" if is_first else f" [{group.protocol.apart(ways[0].protocol)}]")
                charts = _charts(records, methods, over, curves, title(metric, name), text, log=True)
                drawn.append(Figure(title=text, note=_how_evaluated(group.protocol), charts=charts))
    return drawn


def _how_evaluated(way: Evaluated) -> str:
    images = f"of {way.n_generated:,} images" if way.n_generated else ""
    doubt = f"known of none, and so perhaps different: {way.doubt}" if way.doubt else ""
    return "; ".join(filter(None, (f"{better(way.metric)} is better", images, drawn_in_words(way.card), doubt)))


def _evaluated_curves(records: Sequence[RunRecord], group: Group[Evaluated, Evaluation]) -> dict[int, Curve]:
    way, curves = group.protocol, {}
    for i, record in enumerate(records):
        at = {
            line.step: line.metrics[way.metric].value
            for line in record.evaluations
            if i in group.values and line.step is not None and line.name == way.name and way.metric in line.metrics
            and evaluated(line, way.metric) == way
        }  # fmt: skip
        if at:
            steps = sorted(at)
            curves[i] = np.array(steps, dtype=float), np.array([at[step] for step in steps])
    return curves


# ---- over depth -------------------------------------------------------------------------------------------------


def compared(records: Sequence[RunRecord], measure: str) -> list[Group[Protocol, list[Point]]]:
    """The groups that have a column and a chart: the largest, and every other with two runs to compare."""
    groups = measured_alike(records, measure)
    return groups[:1] + [group for group in groups[1:] if len(group.values) > 1]


def _of_depth(records: Sequence[RunRecord], methods: Sequence[Method]) -> list[Figure]:
    """Probe and CKNNA over blocks, where they were measured."""
    drawn = []
    for measure, text in ANALYSES.items():
        for group in compared(records, measure):
            curves = {
                i: (
                    np.array([point.block for point in points], dtype=float),
                    np.array([point.value(measure) or 0.0 for point in points]),
                )
                for i, points in sorted(group.values.items())
            }
            lines = {"logged": [_run_line(records, methods, i, curve) for i, curve in curves.items()]}
            if any(sum(i in curves for i in method.runs) > 1 for method in methods):
                lines = {"methods": _method_lines(methods, curves), **lines}
            charts = {
                ("block", look): Chart(
                    title=text, x_label="block", y_label=ANALYSIS_LABELS[measure], lines=of, from_zero=False
                )
                for look, of in lines.items()
            }
            drawn.append(Figure(title=f"{text} over depth", note=str(group.protocol), charts=charts))
    return drawn
