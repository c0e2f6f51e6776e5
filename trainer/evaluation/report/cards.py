"""Evaluation cards: how each number of images was made, field by field.

A record that has a card shows what is in it, whatever its fields; of an older one, what the record says is shown under
the same names, and the rest is unknown. Evaluations with equal cards share a column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.quality.evaluate import Evaluation
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import Cell, table

UNKNOWN = "unknown"
OF_THE_RUN = ("run", "checkpoint", "checkpoint_sha256", "step", "images", "metrics")  # which differ from run to run
NOTES = ("version", "images_by", "images_format", "decoder", "reference", "project_version", "protocol", "departures")
HASH = 64  # letters of a SHA-256, of which a table shows the first
SHOWN_OF_HASH = 12
MOST_NAMED = 6
AT_LEAST = ("labels", "sampler", "calls", "guidance", "precision", "decoder", "rounding", "n", "reference", "extractor",
            "resize")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """Fields as text, and the runs that were evaluated so, by their places."""

    fields: dict[str, str]
    runs: list[int]


def of_evaluation(line: Evaluation) -> dict[str, str]:
    """Field → text of what is not the run's own."""
    card = _plain(line.card)
    if card is not None:
        return {name: text for name, text in _flat(card).items() if name not in OF_THE_RUN}
    known: dict[str, Any] = {
        "extractor": line.encoder.get("name", line.name),
        "extractor weights": line.encoder.get("weights_sha256"),
        "n": line.generated.n,
        "reference": line.reference.path,
        "reference images": line.reference.n,
        "resize": line.generated.resolution or None,
    }
    return {**dict.fromkeys(AT_LEAST, UNKNOWN), **_flat(known)}


def _plain(card: Any) -> dict[str, Any] | None:
    """The fields of a record's card; None where there is none, or it knows nothing."""
    fields = card if card is None or isinstance(card, dict) else card.plain()
    return fields if fields and any(fields[name] is not None for name in fields if name != "version") else None


def _flat(tree: Mapping[str, Any], topic: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{topic}{name}.")
        else:
            flat[f"{topic}{name}"] = _text(value)
    return flat


def _text(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def cards_of(records: Sequence[RunRecord]) -> list[Card]:
    """The different cards of all evaluations, those of most runs first."""
    found: dict[str, Card] = {}
    for i, record in enumerate(records):
        for line in record.evaluations:
            fields = of_evaluation(line)
            card = found.setdefault(json.dumps(fields, sort_keys=True), Card(fields=fields, runs=[]))
            if i not in card.runs:
                card.runs.append(i)
    return sorted(found.values(), key=lambda card: -len(card.runs))


def unlike(lines: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Fields that change a number, in which cards of evaluations that are compared differ; and their values.

    What names the same thing otherwise changes none (NOTES): the path of a reference, say, beside its digest.
    """
    cards = [of_evaluation(line) for line in lines if _plain(line.card) is not None]
    names = dict.fromkeys(name for card in cards for name in card if name not in NOTES)
    values = {name: list(dict.fromkeys(card.get(name, UNKNOWN) for card in cards)) for name in names}
    return {name: of for name, of in values.items() if len(of) > 1}


def cards(records: Sequence[RunRecord]) -> str:
    """HTML: a row a field, a column a card; fields that differ first."""
    found = cards_of(records)
    if not found:
        return "<p>No run has been evaluated yet.</p>"
    names = list(dict.fromkeys(name for card in found for name in card.fields))
    varying = [name for name in names if len({card.fields.get(name) for card in found}) > 1]
    names = varying + [name for name in names if name not in varying]
    columns = {"": [Cell(text=name.replace("_", " "), key=name) for name in names]}
    for card in found:
        title = _title(records, card.runs)
        while title in columns:
            title += " ′"
        columns[title] = [_cell(card.fields.get(name, UNKNOWN)) for name in names]
    said = (
        f"<p>{len(varying)} of {len(names)} fields differ; these are first.</p>" if varying and len(found) > 1 else ""
    )
    return said + table(columns, label="How images were measured", sortable=False)


def _title(records: Sequence[RunRecord], runs: Sequence[int]) -> str:
    if len(runs) == len(records) > 1:
        return f"all {len(records)} runs"
    names = ", ".join(records[i].name for i in runs[:MOST_NAMED])
    return names + (f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else "")


def _cell(text: str) -> Cell:
    hexadecimal = len(text) == HASH and all(letter in "0123456789abcdef" for letter in text)
    return Cell(text=text[:SHOWN_OF_HASH] if hexadecimal else text, key=text)
