"""`python -m trainer report`: one HTML page about any number of runs, which loads nothing and needs no network.

A table of the runs (of their settings, those that differ), curves, sample grids, and the stores that they read with
their identities. What was not measured is left out. What was measured otherwise than that of other runs stands in
columns and charts of its own, or is left out and named with the command that measures it alike (`alike.py`). Page and
script are `report_page.html`; pictures are in the page, at most PICTURE_SIDE pixels a side.

Runs come from anywhere: every text of theirs is escaped, for HTML and for what a terminal or a reader would obey.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage import StoreError, UserError, open_store
from storage.base.files import write_atomic
from storage.identity import Identity
from trainer.evaluation.generate.image_files import read_image
from trainer.evaluation.probing.measured import Point
from trainer.evaluation.report.alike import (
    Group,
    Protocol,
    command,
    evaluate_command,
    evaluated_alike,
    measured_alike,
)
from trainer.evaluation.report.charts import Chart, Line, escaped, figure
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.table import NOTHING, Cell, number_cell, swatch, table

PAGE = Path(__file__).with_name("report_page.html")
PICTURE_SIDE = 1024
LONGEST_NAME = 24
METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "fd": "Fréchet distance",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A heading and what it shows of a run."""

    title: str
    cell: Callable[[RunRecord], Cell]


def write_report(runs: Sequence[Path], out: Path, title: str) -> list[Path]:
    """Write the page and return its path. Raises UserError."""
    records = read_runs(runs)
    write_atomic(out, page(records, title or _title(records)).encode(), "report")
    n_apart = len(not_compared(records))
    if n_apart:
        print(f"{n_apart} measurements were made otherwise than others; the page says how to compare", file=sys.stderr)
    return [out]


def page(records: Sequence[RunRecord], title: str) -> str:
    """The page's HTML."""
    records = named_shortly(records)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    plural = "s" if len(records) > 1 else ""
    parts = {
        "title": escaped(title),
        "summary": f"{len(records)} run{plural} · {html.escape(made)}",
        "runs": runs_table(records),
        "apart": apart(records),
        "shared": shared_settings(records),
        "legend": legend(records),
        "charts": "".join(figure(chart) for chart in charts(records)) or "<p>Nothing is logged yet.</p>",
        "samples": samples(records),
        "stores": stores(records),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def named_shortly(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs whose names are too long for a legend under the settings that tell them apart, which are in such names."""
    columns = differing(records)
    values = [" · ".join(_setting_cell(run, name).text for name in columns) for run in records]
    if max(len(run.name) for run in records) <= LONGEST_NAME or len(set(values)) < len(records):
        return list(records)
    return [dataclasses.replace(run, name=value) for run, value in zip(records, values, strict=True)]


def _title(records: Sequence[RunRecord]) -> str:
    if len(records) == 1:
        return records[0].name
    folders = sorted({record.path.absolute().parent.name for record in records})
    return f"Runs in {', '.join(folders)}"


# ---- the table of runs ------------------------------------------------------------------------------------------


def runs_table(records: Sequence[RunRecord]) -> str:
    """Every run a row; columns that say nothing of any run are left out."""
    columns = [
        *(_setting_column(name) for name in differing(records)),
        Column(title="Steps", cell=lambda run: number_cell(run.steps, ",", note=_unfinished(run))),
        *(_loss_column(name, title) for name, title in LOSSES.items()),
        *(column for measure, title in ANALYSES.items() for column in _measure_columns(records, measure, title)),
        *(column for name, metric in _measured(records) for column in _metric_columns(records, name, metric)),
        Column(title="Images/s", cell=lambda run: number_cell(run.images_per_s, ".1f")),
        Column(title="GPU-hours", cell=_hours),
    ]
    kept: dict[str, list[Cell]] = {}
    for column in columns:
        cells, title = [column.cell(record) for record in records], column.title
        while title in ("Run", *kept):  # told apart by what a heading does not say
            title += " ′"
        if any(cell.text != NOTHING for cell in cells):
            kept[title] = cells
    names = [Cell(text=record.name, key=record.name) for record in records]
    return table({"Run": names, **kept}, swatches=True, label="Runs")


LOSSES = {"denoising_loss": "Denoising loss", "alignment_loss": "Alignment loss"}
ANALYSES = {"probe": "Linear probe", "cknna": "CKNNA"}


def differing(records: Sequence[RunRecord]) -> list[str]:
    """Settings that are not the same in every run; steps have a column of their own."""
    settings = [record.settings for record in records]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    return [n for n in names if n != "steps" and len({repr(of_run.get(n)) for of_run in settings}) > 1]


def _setting_column(name: str) -> Column:
    return Column(title=name, cell=lambda run: _setting_cell(run, name))


def _setting_cell(run: RunRecord, name: str) -> Cell:
    value = run.settings[name]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text=text or NOTHING, key=value if is_number else text)


def _loss_column(name: str, title: str) -> Column:
    def cell(run: RunRecord) -> Cell:
        applies = run.config.aligns or name != "alignment_loss"
        return number_cell(getattr(run.lines[-1], name) if run.lines and applies else None, ".4f")

    return Column(title=title, cell=cell)


def compared(records: Sequence[RunRecord], measure: str) -> list[Group[Protocol, list[Point]]]:
    """The groups that have a column and a chart: the largest, and every other with two runs to compare."""
    groups = measured_alike(records, measure)
    return groups[:1] + [group for group in groups[1:] if len(group.values) > 1]


def _measure_columns(records: Sequence[RunRecord], measure: str, title: str) -> list[Column]:
    places = {id(record): i for i, record in enumerate(records)}

    def column(group: Group[Protocol, list[Point]], title: str) -> Column:
        def cell(run: RunRecord) -> Cell:
            points = group.values.get(places[id(run)])
            if points is None:
                return Cell(text=NOTHING)
            best = max(points, key=lambda point: point.value(measure) or 0)
            late = "" if best.step == run.checkpoint_step else f", step {best.step:,}"
            features = f" with {group.protocol.features}" if group.protocol.features else ""
            note = f"block {best.block}, t = {best.t:g}{features}{late}"
            return number_cell(best.value(measure), ".1%" if measure == "probe" else ".3f", note=note)

        return Column(title=title, cell=cell)

    groups = compared(records, measure)
    how = ["", *(f" [{group.protocol.apart(groups[0].protocol)}]" for group in groups[1:])]
    return [column(group, title + suffix) for group, suffix in zip(groups, how, strict=False)]


def _measured(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(encoder, metric) of every evaluation, in METRICS' order."""
    measures = {(line.name, metric) for run in records for line in run.evaluations for metric in line.metrics}
    return sorted(
        measures, key=lambda pair: (pair[0], list(METRICS).index(pair[1]) if pair[1] in METRICS else 99, pair[1])
    )


def _metric_columns(records: Sequence[RunRecord], name: str, metric: str) -> list[Column]:
    title = METRICS.get(metric, metric.replace("_", " ").capitalize())
    title = title if name == "inception" else f"{title} ({name})"
    first, *others = evaluated_alike(records, name, metric)
    groups = [first, *(group for group in others if len(group.values) > 1)]
    places = {id(record): i for i, record in enumerate(records)}

    def column(number: int) -> Column:
        def cell(run: RunRecord) -> Cell:
            line = groups[number].values.get(places[id(run)])
            if line is None:
                return Cell(text=NOTHING)
            figures = line.metrics[metric]
            late = "" if line.step == run.checkpoint_step else f", step {line.step or 0:,}"
            images = "number of images not known" if figures.n_generated is None else f"{figures.n_generated:,} images"
            return number_cell(figures.value, ".3f", note=f"{images}{late}")

        other = f" [{groups[number].protocol.apart(first.protocol)}]" if number else ""
        return Column(title=f"{title}{other}", cell=cell)

    return [column(number) for number in range(len(groups))]


def not_compared(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """What was measured otherwise than that of most runs: what and how, and the command that measures it alike."""
    rows = []
    for measure, title in ANALYSES.items():
        groups = measured_alike(records, measure)
        for main, group in [(groups[0], group) for group in groups[1:]]:
            for i, points in group.values.items():
                best = max(point.value(measure) or 0 for point in points)
                value = f"{best:.1%}" if measure == "probe" else f"{best:.3f}"
                differs = main.protocol.apart(group.protocol) if main.protocol.not_known else ""
                why = differs or group.protocol.apart(main.protocol)
                rows.append((f"{records[i].name}: {title} {value} ({why})", command(records[i], main.protocol)))
    for name, metric in _measured(records):
        main_way, *others = evaluated_alike(records, name, metric)
        like = next(iter(main_way.values.values()))
        for way in others:
            for i, line in way.values.items():
                if i in main_way.values:
                    continue
                value = f"{METRICS.get(metric, metric)} {line.metrics[metric].value:.3f} by {name}"
                why = way.protocol.apart(main_way.protocol) or main_way.protocol.apart(way.protocol)
                alike = evaluate_command(records[i], line, like, main_way.protocol)
                rows.append((f"{records[i].name}: {value} ({why})", alike))
    return rows


def apart(records: Sequence[RunRecord]) -> str:
    """What does not compare with the first column or chart of its kind, and what to run so that it does."""
    items = "".join(f"<li>{escaped(what)}<br><code>{escaped(line)}</code></li>" for what, line in not_compared(records))
    heading = "Measured otherwise than most runs, and so not compared with them; measured alike by"
    return f'<p class="apart">{heading}</p><ul class="apart">{items}</ul>' if items else ""


def _hours(run: RunRecord) -> Cell:
    on_gpu = run.device not in ("cpu", "")
    return number_cell(run.hours, ".3g", note=run.device if on_gpu else "CPU")


def _unfinished(run: RunRecord) -> str:
    return "" if run.steps >= run.config.steps else f"of {run.config.steps:,}"


def shared_settings(records: Sequence[RunRecord]) -> str:
    """What is the same in all runs, folded away."""
    varying = set(differing(records))
    same = {name: value for name, value in records[0].settings.items() if name not in varying and name != "steps"}
    items = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(str(value)) or NOTHING}</dd></div>" for name, value in same.items()
    )
    summary = f"Settings that are the same in every run ({len(same)})" if len(records) > 1 else "Settings"
    return f"<details><summary>{summary}</summary><dl>{items}</dl></details>"


# ---- curves, pictures, stores -----------------------------------------------------------------------------------


def legend(records: Sequence[RunRecord]) -> str:
    """Which line is which run."""
    return "".join(f"<li>{swatch(i)}{escaped(record.name)}</li>" for i, record in enumerate(records))


def charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Losses over steps, and where they were measured, probe and CKNNA over blocks."""
    drawn = []
    for name, title in LOSSES.items():
        lines = []
        for i, run in enumerate(records):
            logged = [(line.step, value) for line in run.lines if (value := getattr(line, name)) is not None]
            if logged and (run.config.aligns or name != "alignment_loss"):
                x, y = zip(*logged, strict=True)
                lines.append(Line(label=run.name, number=i, x=x, y=y))
        drawn.append(Chart(title=title, x_label="step", lines=lines))
    for measure, title in ANALYSES.items():
        for group in compared(records, measure):
            lines = [
                Line(
                    label=records[i].name,
                    number=i,
                    x=[point.block for point in points],
                    y=[point.value(measure) or 0.0 for point in points],
                )
                for i, points in sorted(group.values.items())
            ]
            drawn.append(Chart(title=title, note=str(group.protocol), x_label="block", lines=lines))
    return [chart for chart in drawn if chart.lines]


def samples(records: Sequence[RunRecord]) -> str:
    """A grid of images of each run that has one."""
    figures = []
    for i, run in enumerate(records):
        if run.picture is not None:
            name, what = escaped(run.name), escaped(run.picture.stem)
            try:
                image = f'<img src="{_data_uri(run.picture)}" alt="Images drawn from {name}">'
            except (UserError, OSError) as error:
                image, what = "", f"not shown: {escaped(str(error))}"
            figures.append(f"<figure>{image}<figcaption>{swatch(i)}{name}<small>{what}</small></figcaption></figure>")
    return "".join(figures) or "<p>No run has drawn images yet.</p>"


def _data_uri(path: Path) -> str:
    from PIL import Image

    image = Image.fromarray(read_image(path))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def stores(records: Sequence[RunRecord]) -> str:
    """The groups of arrays that the runs read, and what they were made from."""
    used: dict[tuple[str, str, str], list[str]] = {}
    for run in records:
        for path, digest in run.identities.items():
            used.setdefault((run.config.store, path, digest), []).append(run.name)
    if not used:
        return "<p>No run has saved a checkpoint yet.</p>"
    columns: dict[str, list[Cell]] = {name: [] for name in ("Group", *IDENTITY, "Identity", "Rows", "Store", "Runs")}
    for (root, path, digest), names in used.items():
        identity, n_rows, note = _identity(root, path, digest)
        columns["Group"].append(Cell(text=path, key=path, note=note))
        of = (identity.encoder, identity.weights_sha256, identity.resolution, identity.dtype)
        for title, known in zip(IDENTITY, of, strict=True):
            value = NOTHING if known is None else str(known)
            columns[title].append(Cell(text=value[:12] if title == WEIGHTS else value, key=value))
        columns["Identity"].append(Cell(text=digest[:12], key=digest))
        columns["Rows"].append(number_cell(n_rows, ","))
        columns["Store"].append(Cell(text=root, key=root))
        columns["Runs"].append(Cell(text=str(len(names)), key=len(names)))
    return table(columns, label="Stores")


WEIGHTS = "Weights SHA-256"
IDENTITY = ("Encoder", WEIGHTS, "Resolution", "dtype")


def _identity(root: str, path: str, digest: str) -> tuple[Identity, int | None, str]:
    """The group's identity, its rows, and what is amiss; the page is made without a store that is gone."""
    try:
        store = open_store(root)
        group = store.group(path)
    except (StoreError, UserError, OSError) as error:
        return Identity(), None, f"not there now: {' '.join(str(error).split())[:120]}"
    group.close()
    changed = "" if group.identity_digest == digest else "made anew since these runs"
    return group.identity, store.n_rows, changed
