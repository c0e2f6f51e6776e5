"""`python -m trainer compare A B`: the metrics of two results side by side, and in what they were not measured alike.

A result is the JSON that `evaluate` wrote, the folder that it lies in, or a run, whose newest result counts. Numbers
are never printed without what their cards differ in: a setting of the protocol that one of two has otherwise, or that
is not known of one or of both. The status is 0 for results that were measured alike, 1 for others, as of `diff`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.base.shown import shown
from trainer.evaluation.quality.card import Card, differences, unknown_to_both, words_of
from trainer.evaluation.quality.measures import IN_THOUSANDTHS, TITLES
from trainer.evaluation.quality.record import Evaluation, read_record
from trainer.run.folder import RunFolder

FIX = "name a JSON file that `evaluate` wrote"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A result and what it is called."""

    path: Path
    result: Evaluation

    @property
    def card(self) -> Card:
        """Its card; of a result from before there were cards, nothing is known."""
        return self.result.card


def load(path: Path, encoder: str = "") -> Named:
    """The result at a path, of an encoder where it matters. Raises UserError where there is none, or are several."""
    if RunFolder(path).is_run:
        lines = [line for line in read_record(path) if encoder in ("", line.name)]
        if not lines:
            of = f" by {shown(encoder)}" if encoder else ""
            raise UserError(f"run {path} has no result{of}; measure it with `python -m trainer score {path}`")
        return Named(path=path, result=lines[-1])
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.json")) if encoder in ("", file.stem)]
        if len(files) != 1:
            names = ", ".join(file.stem for file in files)
            raise UserError(
                f"{path} holds {len(files)} results{f' ({shown(names)})' if files else ''}; name one with --encoder, "
                "or its file"
            )
        path = files[0]
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {FIX}, its folder, or a run") from None
    return Named(path=path, result=parse_json(Evaluation, raw, str(path), FIX))


def compared(a: Named, b: Named) -> dict[str, Any]:
    """Both results and their cards' differences, as JSON has it."""
    differing = differences(a.card, b.card)
    unknown = unknown_to_both(a.card, b.card)
    return {
        "alike": not differing and not unknown,
        "a": _plain(a),
        "b": _plain(b),
        "differences": [{"field": name, "a": mine, "b": its} for name, mine, its in differing],
        "unknown": unknown,
    }


def _plain(named: Named) -> dict[str, Any]:
    card = named.card
    metrics = {
        name: {"value": metric.value, "interval": list(metric.interval) if metric.interval else None}
        for name, metric in named.result.metrics.items()
    }
    return {
        "result": str(named.path),
        "run": card.run,
        "step": card.step if card.step is not None else named.result.step,
        "samples_of_another_program": card.of_another_program,
        "metrics": metrics,
    }


def text(a: Named, b: Named) -> str:
    """Both results for a person: the numbers, and under them in what they were not measured alike."""
    found = compared(a, b)
    names = [_name(found[side]) for side in "ab"]
    rows = [("", *names)]
    metrics = [found[side]["metrics"] for side in "ab"]
    for name in dict.fromkeys((*metrics[0], *metrics[1])):
        rows.append((TITLES.get(name, name.replace("_", " ")), *(_number(name, each.get(name)) for each in metrics)))
    lines = _in_columns(rows)
    lines += ["", *_how_alike(found, names)]
    return "\n".join(lines)


def _how_alike(found: Mapping[str, Any], names: list[str]) -> list[str]:
    """What to know before the numbers are compared."""
    if found["alike"]:
        return ["measured alike: every setting of the protocol is known and the same"]
    lines = []
    others = [side for side in "ab" if found[side]["samples_of_another_program"]]
    for side in others:
        name = names["ab".index(side)]
        lines.append(f"{name}: samples of another program, or of before cards; how they were drawn is unknown")
    known = [each for each in found["differences"] if None not in (each["a"], each["b"])]
    if known:
        lines.append("not measured alike; the numbers differ for these settings too:")
        lines += _in_columns([(f"  {each['field']}", _value(each["a"]), _value(each["b"])) for each in known])
    unknown = [each for each in found["differences"] if None in (each["a"], each["b"])]
    if unknown:
        lines.append("known of one only, and so perhaps different:")
        lines += _in_columns([(f"  {each['field']}", _value(each["a"]), _value(each["b"])) for each in unknown])
    if found["unknown"]:
        lines.append(f"known of neither, and so perhaps different: {', '.join(found['unknown'])}")
    fields = [each["field"] for each in known]
    if fields:
        lines.append("where " + "; ".join(f"{name} is: {words_of(name)}" for name in fields))
    return lines


def _name(side: Mapping[str, Any]) -> str:
    run = Path(side["run"]).name if side["run"] else Path(side["result"]).stem
    return shown(f"{run}, step {side['step']:,}" if side["step"] is not None else run)


def _number(name: str, metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "–"
    scale = 1000 if name in IN_THOUSANDTHS else 1
    ends = metric["interval"]
    interval = f" ({ends[0] * scale:.3f} to {ends[1] * scale:.3f})" if ends else ""
    return f"{metric['value'] * scale:.3f}{interval}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        value = ", ".join(value)
    text = "unknown" if value is None else shown(f"{value:g}" if isinstance(value, float) else str(value))
    text = text or "none"
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"


def _in_columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_json(a: Named, b: Named) -> str:
    """For other programs."""
    return json.dumps(compared(a, b), indent=1)
