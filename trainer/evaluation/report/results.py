"""The tables of numbers: methods ranked, every measure of every run, and what is not compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.evaluation.probing.measured import Point
from trainer.evaluation.report.alike import (
    Group,
    Protocol,
    command,
    evaluated_alike,
    measured_alike,
)
from trainer.evaluation.report.axes import axis_of
from trainer.evaluation.report.charts import dash, escaped, strip, swatch
from trainer.evaluation.report.curves import ANALYSES, ANALYSES_IN_WORDS, LOSSES, LOSSES_IN_WORDS, compared
from trainer.evaluation.report.measures import better, explained, measured, span, spelled, title, with_spread
from trainer.evaluation.report.methods import SEED, Method, differing, setting, style_of
from trainer.evaluation.report.reached import EPOCHS_IN_WORDS, epochs_column
from trainer.evaluation.report.remeasure import measure_alike
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.spread import LEVEL, deviation, mean
from trainer.evaluation.report.table import NOTHING, Cell, number_cell, table
from trainer.evaluation.report.verdict import Ranked, Verdict, spread_lent

STEPS = "Steps"
LONGEST_SETTINGS = 100  # letters of what sets a method apart, below its name


@dataclass(frozen=True, kw_only=True)
class Column:
    """A heading, what it shows of a run, and what its number is, in words."""

    title: str
    cell: Callable[[RunRecord], Cell]
    words: str = ""


def names(records: Sequence[RunRecord], methods: Sequence[Method]) -> list[Cell]:
    """The first column of tables of runs."""
    return [
        Cell(text=record.name, key=record.name, before=swatch(*style_of(methods, i)))
        for i, record in enumerate(records)
    ]


# ---- the answer -------------------------------------------------------------------------------------------------


def ranking_table(answer: Verdict, records: Sequence[RunRecord]) -> str:
    """HTML: the methods that were measured alike, the best first, with what sets each apart; "" where there is none."""
    if answer.group is None or not answer.ranking:
        return ""
    way = answer.group.protocol
    values = [value for ranked in answer.ranking for value in ranked.values.values()]
    axis = axis_of(values, zero=min(values) >= 0)
    spreads = [ranked.behind.spread for ranked in answer.ranking if ranked.behind is not None]
    columns = {
        "Method": [
            Cell(text=ranked.method.name, key=ranked.method.name, note=told, before=swatch(ranked.method.number, ""))
            for ranked, told in zip(answer.ranking, _set_apart(answer.ranking, records), strict=True)
        ],
        f"{title(way.metric, way.name)}, {better(way.metric)} is better": [
            Cell(text=ranked.text, key=ranked.mean, note=_what(ranked)) for ranked in answer.ranking
        ],
        f"Seeds, {'0' if axis.begins_at_zero else spelled(axis.low)} to {spelled(axis.high)}": [
            Cell(text="", key=ranked.mean, svg=_strip(ranked, axis)) for ranked in answer.ranking
        ],
        "Number of seeds": [number_cell(len(ranked.values), "d") for ranked in answer.ranking],
    }
    if len(answer.ranking) > 1 and spreads:
        columns[f"Behind {answer.ranking[0].method.name}"] = [_behind(ranked, answer) for ranked in answer.ranking]
    return table(columns, label="Methods, the best first", sortable=False)


def _set_apart(ranking: Sequence[Ranked], records: Sequence[RunRecord]) -> list[str]:
    """The settings in which the methods differ, of each; "" where they are too many for a line."""
    firsts = [records[ranked.method.runs[0]] for ranked in ranking]
    names = [name for name in differing(firsts) if name != SEED]
    told = [
        ", ".join(f"{name.rpartition('.')[2].replace('_', ' ')} {setting(run, name) or NOTHING}" for name in names)
        for run in firsts
    ]
    return told if max(map(len, told)) <= LONGEST_SETTINGS else [""] * len(ranking)


def _strip(ranked: Ranked, axis: object) -> str:
    return strip(list(ranked.values.values()), axis, ranked.method.number)  # type: ignore[arg-type]


def _what(ranked: Ranked) -> str:
    """What a method's number is. The interval by the images drawn is not here: it would pass for one of methods."""
    n = len(ranked.values)
    return f"mean ± deviation of {n} seeds" if n > 1 else "one seed"


def _behind(ranked: Ranked, answer: Verdict) -> Cell:
    if ranked.behind is None:
        lead = "lowest" if better(answer.group.protocol.metric) == "lower" else "highest"  # type: ignore[union-attr]
        return Cell(text="best" if answer.outcome == "clear" else lead, key=0.0)
    value = abs(ranked.behind.value)
    if ranked.behind.interval is None:
        return Cell(text=spelled(value), key=value, note="one seed each: cannot say")
    what = "more than seeds differ" if ranked.behind.is_settled else "within what seeds differ"
    if not ranked.behind.is_settled and not ranked.behind.is_within:
        what = "not settled by so few seeds"
    low, high = sorted(ranked.behind.interval, key=abs)
    low = low if ranked.behind.is_settled else -abs(low)
    ends = span(abs(low) if ranked.behind.is_settled else low, abs(high))
    lent = spread_lent(answer.ranking, [answer.ranking[0], ranked])
    note = f"{what} ({LEVEL:.0%} interval {ends} by the seeds{f'; {lent}' if lent else ''})"
    return Cell(text=spelled(value), key=value, note=note)


# ---- every measure ----------------------------------------------------------------------------------------------


def columns_of(records: Sequence[RunRecord]) -> dict[str, list[Cell]]:
    """Every measure of every run; columns that say nothing of any run are left out."""
    cells = {heading: [column.cell(record) for record in records] for heading, column in _columns(records).items()}
    epochs = epochs_column(records)
    return cells if epochs is None else {**dict([epochs]), **cells}


def in_words(records: Sequence[RunRecord]) -> dict[str, str]:
    """Heading → what the number below it is, of every column of `columns_of`."""
    words = {heading: column.words for heading, column in _columns(records).items()}
    epochs = epochs_column(records)
    found = words if epochs is None else {epochs[0]: EPOCHS_IN_WORDS, **words}
    return {heading: text for heading, text in found.items() if text}


def _columns(records: Sequence[RunRecord]) -> dict[str, Column]:
    """By heading; those that say something of a run."""
    columns = [
        *(column for name, metric in measured(records) for column in _metric_columns(records, name, metric)),
        *(column for measure, text in ANALYSES.items() for column in _measure_columns(records, measure, text)),
        *(_loss_column(name, text) for name, text in LOSSES.items()),
        Column(
            title=STEPS,
            cell=lambda run: number_cell(run.steps, ",", note=_unfinished(run)),
            words="optimiser steps that the run has done",
        ),
    ]
    kept: dict[str, Column] = {}
    for column in columns:
        heading = column.title
        while heading in ("Run", "Method", *kept):  # told apart by what a heading does not say
            heading += " ′"
        if any(column.cell(record).text != NOTHING for record in records):
            kept[heading] = column
    return kept


def runs_table(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: a row a run."""
    return table({"Run": names(records, methods), **columns_of(records)}, label="Every run")


def methods_table(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: a row a method, means and deviations over seeds; "" where no method has two runs."""
    if all(len(method.runs) < 2 for method in methods):
        return ""
    first = [
        Cell(
            text=method.name,
            key=method.name,
            note=f"{len(method.runs)} seed{'s' if len(method.runs) > 1 else ''}",
            before=swatch(method.number, ""),
        )
        for method in methods
    ]
    of_methods = {
        heading: [
            (_span_cell if heading == STEPS else _mean_cell)([cells[i] for i in method.runs]) for method in methods
        ]
        for heading, cells in columns_of(records).items()
    }
    return table({"Method": first, **of_methods}, label="Methods")


def _span_cell(cells: Sequence[Cell]) -> Cell:
    """From the least to the most."""
    found = sorted(cells, key=lambda cell: float(cell.key or 0))
    texts = list(dict.fromkeys((found[0].text, found[-1].text)))
    return Cell(text=" to ".join(texts), key=found[-1].key, note=found[0].note)


def _mean_cell(cells: Sequence[Cell]) -> Cell:
    values = [float(cell.key) for cell in cells if isinstance(cell.key, int | float)]
    if not values:
        return Cell(text=NOTHING)
    if len(set(values)) == 1:
        found = next(cell for cell in cells if isinstance(cell.key, int | float))
        return Cell(text=found.text, key=found.key, note=_of(values, cells))
    percent = any(cell.text.endswith("%") for cell in cells)
    spread = deviation(values) or 0.0
    text = f"{mean(values):.1%} ± {spread:.1%}" if percent else with_spread(mean(values), spread)
    return Cell(text=text, key=mean(values), note=_of(values, cells))


def _of(values: Sequence[float], cells: Sequence[Cell]) -> str:
    return f"of {len(values)} of {len(cells)} runs" if len(values) < len(cells) else ""


def _unfinished(run: RunRecord) -> str:
    return "" if run.steps >= run.config.steps else f"of {run.config.steps:,}"


def _loss_column(name: str, text: str) -> Column:
    def cell(run: RunRecord) -> Cell:
        applies = run.config.aligns or name != "alignment_loss"
        return number_cell(getattr(run.lines[-1], name) if run.lines and applies else None, ".4f")

    return Column(title=text, cell=cell, words=LOSSES_IN_WORDS[name])


def _measure_columns(records: Sequence[RunRecord], measure: str, text: str) -> list[Column]:
    places = {id(record): i for i, record in enumerate(records)}

    def column(group: Group[Protocol, list[Point]], heading: str) -> Column:
        def cell(run: RunRecord) -> Cell:
            points = group.values.get(places[id(run)])
            if points is None:
                return Cell(text=NOTHING)
            best = max(points, key=lambda point: point.value(measure) or 0)
            late = "" if best.step == run.checkpoint_step else f", step {best.step:,}"
            features = f" with {group.protocol.features}" if group.protocol.features else ""
            note = f"block {best.block}, t = {best.t:g}{features}{late}"
            return number_cell(best.value(measure), ".1%" if measure == "probe" else ".3f", note=note)

        return Column(title=heading, cell=cell, words=ANALYSES_IN_WORDS[measure])

    groups = compared(records, measure)
    how = ["", *(f" [{group.protocol.apart(groups[0].protocol)}]" for group in groups[1:])]
    return [column(group, text + suffix) for group, suffix in zip(groups, how, strict=False)]


def images_behind(records: Sequence[RunRecord]) -> int | None:
    """How many images every measure of images is of; None where they are not of equally many."""
    evaluations = (line for record in records for line in record.evaluations)
    counts = {metric.n_generated for line in evaluations for metric in line.metrics.values()}
    return next(iter(counts)) if len(counts) == 1 else None


def _metric_columns(records: Sequence[RunRecord], name: str, metric: str) -> list[Column]:
    """One for each way of measuring that most runs have, that several have, or that a run has besides the first."""
    text = title(metric, name)
    first, *others = evaluated_alike(records, name, metric)
    groups = [first, *(each for each in others if len(each.values) > 1 or set(each.values) <= set(first.values))]
    places = {id(record): i for i, record in enumerate(records)}
    alike = images_behind(records)

    def column(number: int) -> Column:
        def cell(run: RunRecord) -> Cell:
            line = groups[number].values.get(places[id(run)])
            if line is None:
                return Cell(text=NOTHING)
            figures = line.metrics[metric]
            late = "" if line.step == run.checkpoint_step else f"step {line.step or 0:,}"
            interval = f"{LEVEL:.0%} {span(*figures.interval)}" if figures.interval is not None else ""
            images = "" if alike is not None else "number of images not known"
            if alike is None and figures.n_generated is not None:
                images = f"{figures.n_generated:,} images"
            note = "; ".join(filter(None, (interval, images, late)))
            return Cell(text=spelled(figures.value), key=figures.value, note=note)

        other = f" [{groups[number].protocol.apart(first.protocol)}]" if number else ""
        doubt = groups[number].protocol.doubt if len(groups[number].values) > 1 else ""
        perhaps = f"; known of none of these runs, and so perhaps different: {doubt}" if doubt else ""
        return Column(title=f"{text}{other}", cell=cell, words=f"{explained(metric, name)}{perhaps}")

    return [column(number) for number in range(len(groups))]


# ---- what does not compare --------------------------------------------------------------------------------------


def not_compared(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """What was measured otherwise than that of most runs: what and how, and the command that measures it alike."""
    rows = []
    for measure, text in ANALYSES.items():
        groups = measured_alike(records, measure)
        for main, group in [(groups[0], group) for group in groups[1:]]:
            for i, points in group.values.items():
                best = max(point.value(measure) or 0 for point in points)
                value = f"{best:.1%}" if measure == "probe" else f"{best:.3f}"
                differs = main.protocol.apart(group.protocol) if main.protocol.not_known else ""
                why = differs or group.protocol.apart(main.protocol)
                rows.append((f"{records[i].name}: {text} {value} ({why})", command(records[i], main.protocol)))
    for name, metric in measured(records):
        main_way, *others = evaluated_alike(records, name, metric)
        like = next(iter(main_way.values.values()))
        for way in others:
            for i, line in way.values.items():
                if i in main_way.values:
                    continue
                value = f"{title(metric, 'inception')} {spelled(line.metrics[metric].value)} by {name}"
                why = way.protocol.apart(main_way.protocol) or main_way.protocol.apart(way.protocol)
                alike = measure_alike(records[i], line, like, main_way.protocol)
                rows.append(alike.row(f"{records[i].name}: {value} ({why})"))
    return rows


def apart(records: Sequence[RunRecord]) -> str:
    """HTML: what does not compare with the first column or chart of its kind, and what to run so that it does."""
    heading = "Measured otherwise than most runs, and so not compared with them; measured alike by"
    return commands(heading, not_compared(records))


def commands(heading: str, rows: Sequence[tuple[str, str]], most: int = 1000, *, folded: bool = False) -> str:
    """HTML: a list of what there is to run, and why; "" for none."""
    items = "".join(
        f"<li>{escaped(what)}{f'<br><code>{escaped(line)}</code>' if line else ''}</li>" for what, line in rows[:most]
    )
    more = f"<li>and {len(rows) - most} more</li>" if len(rows) > most else ""
    if not items:
        return ""
    listed = f'<ul class="apart">{items}{more}</ul>'
    if folded:
        return f"<details><summary>{heading}</summary>{listed}</details>"
    return f'<p class="apart">{heading}</p>{listed}'


def legend(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: which colour is which method, and which line is which run of it."""
    parts = []
    for method in methods:
        runs = "".join(
            f'<span class="run">{swatch(*style_of(methods, i))}{escaped(records[i].name)}</span>'
            for i in method.runs
            if len(method.runs) > 1
        )
        line = swatch(method.number, dash(method.number))
        shows = f'<button type="button" data-n="{method.number}" aria-pressed="true" title="show or hide">'
        parts.append(f"<li>{shows}{line}<b>{escaped(method.name)}</b></button>{runs}</li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'
