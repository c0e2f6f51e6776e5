"""Evaluation cards: how each number of images was made, field by field.

A record that has a card shows what is in it, whatever its fields; of an older one, what the record says is shown under
the same names, and the rest is unknown. Evaluations with equal cards share a column.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.quality.card import NOTE, PROTOCOL, Card, differences, names_of, words_of
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import Cell, table

UNKNOWN = "unknown"
HASH = 64  # letters of a SHA-256, of which a table shows the first
SHOWN_OF_HASH = 12
MOST_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Fields as text, and the runs that were evaluated so, by their places."""

    fields: dict[str, str]
    runs: list[int]


def card_of(line: Evaluation) -> Card:
    """A record's card; of one from before there were cards, with what the record says in other words."""
    if line.card != Card():
        return line.card
    return Card(
        extractor=line.encoder.get("name", line.name),
        extractor_sha256=line.encoder.get("weights_sha256"),
        n_images=line.generated.n,
        reference=line.reference.path,
        n_reference=line.reference.n,
    )


def of_evaluation(line: Evaluation) -> dict[str, str]:
    """Field → text of what is not the run's own."""
    card = card_of(line)
    notes = [name for name in names_of(NOTE) if name != "images"]  # which differ from run to run
    return {name: _text(getattr(card, name)) for name in (*names_of(PROTOCOL), *notes)}


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if value == "" or value == ():
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def cards_of(records: Sequence[RunRecord]) -> list[Shared]:
    """The different cards of all evaluations, those of most runs first."""
    found: dict[str, Shared] = {}
    for i, record in enumerate(records):
        for line in record.evaluations:
            fields = of_evaluation(line)
            card = found.setdefault(json.dumps(fields, sort_keys=True), Shared(fields=fields, runs=[]))
            if i not in card.runs:
                card.runs.append(i)
    return sorted(found.values(), key=lambda card: -len(card.runs))


def unlike(lines: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Fields of the protocol in which cards of evaluations that are compared differ, and their values.

    Beside a card, a record from before there were cards differs in all that it does not say.
    """
    cards = [line.card for line in lines]
    names = dict.fromkeys(name for card in cards for name, *_ in differences(cards[0], card))
    return {name: list(dict.fromkeys(_text(getattr(card, name)) for card in cards)) for name in names}


def cards(records: Sequence[RunRecord]) -> str:
    """HTML: a row a field, a column a card; fields that differ first."""
    found = cards_of(records)
    if not found:
        return "<p>No run has been evaluated yet.</p>"
    names = list(dict.fromkeys(name for card in found for name in card.fields))
    varying = [name for name in names if len({card.fields.get(name) for card in found}) > 1]
    names = varying + [name for name in names if name not in varying]
    columns = {"": [Cell(text=name.replace("_", " "), key=name, note=words_of(name)) for name in names]}
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
