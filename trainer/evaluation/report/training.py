"""In what the methods of a page were not trained alike: how long, on what, which model; each setting with its values.

What a method is about is left out, since it is what the page compares: the losses, their target and how images are
drawn while training. All other settings that differ are named, those first that a result depends on most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.cards import MOST_NAMED
from trainer.evaluation.report.methods import Method, differing, setting
from trainer.evaluation.report.run_record import RunRecord

ALMOST = 0.005  # two runs saw as many images where these differ by less
MEASURED, SEEN, DATA = "measured after steps", "images seen", "latents of the data"
OF_METHODS = ("loss.", "sample.", "data.features", "preset", "seed")
WORDS = {
    "steps": "steps in all",
    "batch": "batch (images a step)",
    "store": "data (store)",
    "data.latents": "latents",
    "model.kind": "kind of model",
}
FIRST = ("steps", "batch", "store", "data.", "model.", "optim.")
SHOWN_OF_HASH = 12


def unlike_training(
    records: Sequence[RunRecord], evaluated: Mapping[int, Evaluation], methods: Sequence[Method]
) -> list[str]:
    """One line that names what differs between the runs that were evaluated, with each run's value; [] for nothing."""
    chosen = {i: evaluation for i, evaluation in sorted(evaluated.items()) if any(i in each.runs for each in methods)}
    if len(methods) < 2 or not chosen:
        return []
    steps = {i: each.step for i, each in chosen.items() if each.step is not None}
    rows = {MEASURED: {i: f"{step:,}" for i, step in steps.items()}}
    runs = [records[i] for i in chosen]
    for name in sorted(differing(runs, also=("steps",)), key=_place):
        if not name.startswith(OF_METHODS):
            rows[WORDS.get(name, name)] = {i: _text(setting(records[i], name)) for i in chosen}
    rows[DATA] = {i: _latents(records[i]) for i in chosen if records[i].identities}
    seen = {i: round(step * records[i].config.batch) for i, step in steps.items()}
    if seen and max(seen.values()) - min(seen.values()) > ALMOST * max(seen.values()):
        rows[SEEN] = {i: f"{n:,}" for i, n in seen.items()}
    parts = [
        f"{what} {_values(records, values, methods)}" for what, values in rows.items() if len(set(values.values())) > 1
    ]
    more = len(parts) - MOST_NAMED
    if more > 0:
        last = [part for part in parts if part.startswith(SEEN)]
        parts = [*parts[:MOST_NAMED], *(part for part in last if part not in parts[:MOST_NAMED])]
        parts.append("and more, under Settings")
    return [f"Not trained alike: {'; '.join(parts)}"] if parts else []


def _place(name: str) -> int:
    return next((place for place, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def _text(value: str) -> str:
    if value.lstrip("-").isdecimal():
        return f"{int(value):,}"
    return value or "none"


def _latents(record: RunRecord) -> str:
    """Which latents were trained on: path and the start of their identity's digest."""
    return ", ".join(
        f"{path} ({digest[:SHOWN_OF_HASH]})"
        for path, digest in record.identities.items()
        if path.startswith("latents/")
    )


def _values(records: Sequence[RunRecord], values: Mapping[int, str], methods: Sequence[Method]) -> str:
    """Each value and whose it is: a method's where all of its runs have it, else the runs'."""
    whose: dict[str, list[str]] = {}
    for method in methods:
        of_method = {i: values[i] for i in method.runs if i in values}
        if len(set(of_method.values())) == 1:
            whose.setdefault(next(iter(of_method.values())), []).append(method.name)
        else:
            for i, value in of_method.items():
                whose.setdefault(value, []).append(records[i].name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in whose.items())
