"""Runs that are equal but for their seed are one method: how they are grouped, named, and told apart in colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.report.charts import DASHES, N_COLOURS
from trainer.evaluation.report.run_record import RunRecord

LONGEST_NAME = 24
SEED = "seed"
END = re.compile(r"[-_. ,=]*(?:(?<![a-z])s(?:eed)?)?[-_. ,=]*\d*$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Places of its runs among all; `number` chooses its colour."""

    name: str
    number: int
    runs: tuple[int, ...]


def methods_of(records: Sequence[RunRecord]) -> list[Method]:
    """Every run in one method, in the order of the first run of each."""
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(repr({**record.settings, SEED: None}), []).append(i)
    names = _names(records, list(groups.values()))
    return [
        Method(name=name, number=number, runs=tuple(runs))
        for number, (name, runs) in enumerate(zip(names, groups.values(), strict=True))
    ]


def _names(records: Sequence[RunRecord], groups: Sequence[Sequence[int]]) -> list[str]:
    """What the runs' names share, else the settings that tell methods apart, else the first run's name."""
    firsts = [records[group[0]] for group in groups]
    shared = []
    for group in groups:
        names = [records[i].name for i in group]
        common = END.sub("", _shared_start(names)) if len(group) > 1 else names[0]
        shared.append(common)
    if all(shared) and len(set(shared)) == len(groups):
        return shared
    columns = [name for name in differing(firsts, also=("steps",)) if name != SEED]
    values = [" · ".join(setting(run, name) for name in columns) for run in firsts]
    if all(values) and len(set(values)) == len(groups) and max(map(len, values)) <= 3 * LONGEST_NAME:
        return values
    return [run.name for run in firsts]


def _shared_start(names: Sequence[str]) -> str:
    """The characters that all names begin with."""
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def style_of(methods: Sequence[Method], run: int) -> tuple[int, str]:
    """Colour and dashes of a run: its method's colour, and dashes that tell its seeds apart."""
    method = next(method for method in methods if run in method.runs)
    return method.number, DASHES[(method.number // N_COLOURS + method.runs.index(run)) % len(DASHES)]


def differing(records: Sequence[RunRecord], also: Sequence[str] = ()) -> list[str]:
    """Settings that are not the same in every run; steps have a column of their own."""
    settings = [record.settings for record in records]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    return [
        name
        for name in names
        if (name != "steps" or name in also) and len({repr(of_run.get(name)) for of_run in settings}) > 1
    ]


def setting(run: RunRecord, name: str) -> str:
    """A setting as text; "" where it is empty or the run has none of that name."""
    value = run.settings.get(name, "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def equal_seeds(records: Sequence[RunRecord], a: Method, b: Method) -> list[tuple[int, int]]:
    """Pairs (run of a, run of b) with the same seed, each run once."""
    by_seed = {records[i].config.seed: i for i in reversed(b.runs)}
    pairs = {records[i].config.seed: (i, by_seed[records[i].config.seed]) for i in reversed(a.runs)
             if records[i].config.seed in by_seed}  # fmt: skip
    return [pairs[seed] for seed in sorted(pairs)]
