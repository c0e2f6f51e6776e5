"""The analysis figures of REPA (arXiv 2410.06940), for any set of runs.

    motivation   figure 2: linear probing over depth and time; alignment (CKNNA) with the features over depth and time;
                 best alignment over training, a line a run, so that model sizes compare
    key-idea     figure 3: the same two over depth at one time, runs with and without alignment side by side; and the
                 Fréchet distance against alignment, for the steps of which `evaluate --run` measured one

The features are the store's (DINOv2-g in the paper), chosen by --features. `probe` and `cknna` draw one of the measures
for one run.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.base.errors import UserError
from storage.base.waiting import waiting
from trainer.evaluation.probing.measured import read_measured
from trainer.evaluation.probing.plots import Panel, Series, Style, write_figure
from trainer.evaluation.probing.sweep import Measure, SweepConfig, open_samples, sweep
from trainer.evaluation.quality.record import Evaluation, read_record
from trainer.evaluation.report.alike import Evaluated, evaluated
from trainer.evaluation.report.run_record import names_of
from trainer.run.folder import RunFolder, step_in_name
from trainer.run.opened import checkpoints_of, open_run

MEASURES: dict[Measure, str] = {"probe": "linear probing accuracy", "cknna": "CKNNA"}
ANALYSE = "analyse"
LETTERS_OF_NOTE = 60
STYLES: tuple[Style, ...] = ("solid", "dashed", "dotted")


def write_measure(run: Path, config: SweepConfig, measure: Measure, out: Path | None) -> list[Path]:
    """`probe` and `cknna`: RUN/analysis/MEASURE.{json,svg}; returns the paths. Raises UserError."""
    return _write_measure(run, {**sweep(run, config, [measure]), "by": measure}, measure, config.times, out)


def _write_measure(
    run: Path, measured: dict[str, Any], measure: Measure, times: Sequence[float], out: Path | None = None
) -> list[Path]:
    measured = {**measured, "points": [point for point in measured["points"] if measure in point]}
    series = []
    steps = sorted({point["step"] for point in measured["points"]})
    for group, step in enumerate(steps):
        for i, t in enumerate(times):
            label = f"step {step:,}, t = {t:g}"
            series.append(_line(measured, measure, label, step, t, group=group, style=STYLES[i % len(STYLES)]))
    panel = _over_depth(measure, measured["name"], [line for line in series if line.x], [measured])
    return write_figure([panel], out or RunFolder(run).analysis(measure).with_suffix(""), measured)


def write_analysis(runs: Sequence[Path], config: SweepConfig, out: Path) -> list[Path]:
    """Measure every run and write OUT/motivation.{json,svg} and OUT/key-idea.{json,svg}; returns the paths.

    What was measured of a run is written beside it too, as `write_measure` does, where the report finds it; but what
    `probe` or `cknna` wrote there stays. Raises UserError.
    """
    if len(set(runs)) < len(runs):
        raise UserError("a run was named twice; name each once")
    middle = min(config.times, key=lambda t: abs(t - 0.5))
    with waiting("opening the runs and their stores"):
        config = _one_target(runs, config)
    names = names_of(runs)
    beside = {(run, measure): read_measured(run, measure) for run in runs for measure in MEASURES}
    records = [read_record(run) for run in runs]
    measured = [{**_measure_run(run, config, middle), "name": name} for run, name in zip(runs, names, strict=True)]
    paths = write_figure(motivation(measured, config.times, middle), out / "motivation", {"runs": measured})
    paths += write_figure(key_idea(measured, records, middle), out / "key-idea", {"runs": measured})
    for run, of_run in zip(runs, measured, strict=True):
        for measure in MEASURES:
            existing = beside[run, measure]
            if existing is None or existing.by == ANALYSE:
                paths += _write_measure(run, {**of_run, "by": ANALYSE}, measure, config.times)
    return paths


def _one_target(runs: Sequence[Path], config: SweepConfig) -> SweepConfig:
    """The configuration with the features that every run is compared with; hours are not spent on runs that differ.

    Raises UserError when a run is none, and when stores, targets or the samples that can be measured differ and neither
    --store nor --features decides.
    """
    targets: dict[str, str] = {}
    for path in runs:
        run = open_run(path)
        checkpoints_of(path)
        if run.data.features and not config.features:
            targets.setdefault(run.data.features[0].path, path.name)
        run.data.close()
    if len(targets) > 1:
        shown = ", ".join(f"{name} with {target}" for target, name in targets.items())
        raise UserError(f"the runs are aligned with different features ({shown}); choose one by --features NAME")
    config = dataclasses.replace(config, features=next(iter(targets), config.features))
    digests: dict[str, str] = {}
    rows: dict[str, str] = {}
    for path in runs:
        run = open_run(path)
        samples = open_samples(run, config)
        digests.setdefault(samples.features.identity_digest, path.name)
        rows.setdefault(samples.digest, path.name)
        samples.close()
        run.data.close()
    if len(digests) > 1:
        raise UserError(
            f"{' and '.join(digests.values())} are of stores whose {samples.features.path} differ (other images or "
            "another encoder); name one --store for all"
        )
    if len(rows) > 1:
        raise UserError(
            f"{' and '.join(rows.values())} would be measured on other samples than one another (those that failed in "
            "their stores differ); name one --store for all"
        )
    return config


def _measure_run(run: Path, config: SweepConfig, middle: float) -> dict[str, Any]:
    """Both measures at the newest checkpoint; of earlier ones the alignment at the middle time."""
    measured = sweep(run, dataclasses.replace(config, checkpoints="latest"), ["probe", "cknna"])
    newest = measured["points"][0]["step"]
    steps = [step_in_name(path) for path in checkpoints_of(run, "all")]
    earlier = ",".join(str(step) for step in steps if step != newest)
    if earlier:
        before = sweep(run, dataclasses.replace(config, checkpoints=earlier, times=(middle,)), ["cknna"])
        measured["points"] += before["points"]
    return measured


def motivation(measured: list[dict[str, Any]], times: Sequence[float], middle: float) -> list[Panel]:
    """The panels of figure 2, of what was measured of each run."""
    panels = []
    for measure in MEASURES:
        series = [
            _line(
                run, measure, f"{run['name']}, t = {t:g}", _newest(run), t, group=group, style=STYLES[i % len(STYLES)]
            )
            for group, run in enumerate(measured)
            for i, t in enumerate(times)
        ]
        panels.append(_over_depth(measure, "Over depth and time", series, measured))
    over_training = []
    for group, run in enumerate(measured):
        best = _best_alignment(run, middle)
        label = f"{run['name']} ({run['parameters'] / 1e6:.0f} M)"
        over_training.append(Series(label=label, x=list(best), y=list(best.values()), group=group))
    return [
        *panels,
        Panel(
            title=f"Over training and size, t = {middle:g}",
            x_label="training step",
            y_label="CKNNA of the best block",
            series=over_training,
        ),
    ]


def key_idea(measured: list[dict[str, Any]], records: list[list[Evaluation]], middle: float) -> list[Panel]:
    """The panels of figure 3, of what was measured of each run and what `evaluate` recorded of it.

    Of the distances, those that were measured as most runs' were (`alike.py`); how many others there are, is noted, and
    what the cards of those leave out.
    """
    panels = []
    for measure in MEASURES:
        series = [
            _line(run, measure, _described(run), _newest(run), middle, group=group)
            for group, run in enumerate(measured)
        ]
        panels.append(_over_depth(measure, f"Over depth, t = {middle:g}", series, measured))
    distances, ways, n_left_out = _alike([_distances(record) for record in records])
    encoders = sorted({encoder for distance in distances for encoder, _ in distance})
    for encoder in encoders or [""]:  # each on an axis of its own: they differ by orders of magnitude
        against = []
        for group, (run, distance) in enumerate(zip(measured, distances, strict=True)):
            best = _best_alignment(run, middle)
            steps = [step for name, step in distance if name == encoder and step in best]
            if steps:
                x, y = [best[step] for step in steps], [distance[encoder, step] for step in steps]
                against.append(Series(label=_described(run), x=x, y=y, group=group, style="points"))
        panels.append(
            Panel(
                title="Alignment and generation",
                x_label=f"CKNNA of the best block, t = {middle:g}",
                y_label=f"Fréchet distance, {encoder}" if len(encoders) > 1 else "Fréchet distance",
                series=against,
                whole_x=False,
                note=_note(bool(against), n_left_out, ways[encoder].doubt if encoder in ways else ""),
            )
        )
    return panels


def _over_depth(measure: Measure, title: str, series: list[Series], measured: list[dict[str, Any]]) -> Panel:
    """A panel over blocks; probing has the features' own accuracy as a level."""
    levels = {(run["features"]["probe"], run["features"]["path"]) for run in measured if "probe" in run["features"]}
    return Panel(
        title=title,
        x_label="block",
        y_label=MEASURES[measure],
        series=series,
        levels=sorted(levels) if measure == "probe" else [],
    )


def _line(
    run: dict[str, Any], measure: Measure, label: str, step: int, t: float, *, group: int, style: Style = "solid"
) -> Series:
    """One measure over blocks."""
    points = sorted(
        (p for p in run["points"] if measure in p and p["step"] == step and p["t"] == t), key=lambda p: p["block"]
    )
    y = [point[measure] for point in points]
    return Series(label=label, x=[point["block"] for point in points], y=y, group=group, style=style)


def _newest(run: dict[str, Any]) -> int:
    return max(point["step"] for point in run["points"])


def _best_alignment(run: dict[str, Any], t: float) -> dict[int, float]:
    """Step → CKNNA of the block that is aligned best."""
    points = [point for point in run["points"] if point["t"] == t and "cknna" in point]
    steps = sorted({point["step"] for point in points})
    return {step: max(point["cknna"] for point in points if point["step"] == step) for step in steps}


def _note(drawn: bool, n_left_out: int, doubt: str) -> str:
    others = f"{n_left_out} measured otherwise, left out\n(`report` says how they differ)" if n_left_out else ""
    if drawn:
        unsure = textwrap.wrap(f"known of none, and so perhaps different: {doubt}", LETTERS_OF_NOTE) if doubt else []
        return "\n".join(filter(None, [*unsure, others]))
    return "\n".join(
        filter(None, ["no Fréchet distance was measured of these checkpoints", "(evaluate … --run RUN)", others])
    )


def _distances(record: list[Evaluation]) -> dict[tuple[Evaluated, int], float]:
    """(how, step) → Fréchet distance, the last measured."""
    distances = {}
    for line in record:
        for metric in ("fid", "fd"):
            if metric in line.metrics and line.step is not None:
                distances[evaluated(line, metric), line.step] = line.metrics[metric].value
    return distances


def _alike(
    of_runs: list[dict[tuple[Evaluated, int], float]],
) -> tuple[list[dict[tuple[str, int], float]], dict[str, Evaluated], int]:
    """Of each run, (encoder, step) → what was measured as it was of most runs; how that was; how many others there are.

    What is not known to be alike is taken of one run only.
    """
    ways: dict[tuple[Evaluated, int], list[int]] = {}
    for i, distances in enumerate(of_runs):
        for way in dict.fromkeys(way for way, _ in distances):
            ways.setdefault((way, i if way.not_known else -1), []).append(i)
    chosen: dict[str, tuple[Evaluated, int]] = {}
    for key in sorted(ways, key=lambda key: (len(ways[key]), key[0].n_generated or 0), reverse=True):
        chosen.setdefault(key[0].name, key)
    kept = [
        {
            (way.name, step): value
            for (way, step), value in distances.items()
            if chosen[way.name] == (way, i if way.not_known else -1)
        }
        for i, distances in enumerate(of_runs)
    ]
    how = {name: way for name, (way, _) in chosen.items()}
    return kept, how, sum(map(len, of_runs)) - sum(map(len, kept))


def _described(run: dict[str, Any]) -> str:
    blocks = " and ".join(str(block) for block in run["aligned_blocks"])
    return f"{run['name']} ({f'aligned after block {blocks}' if blocks else 'not aligned'})"
