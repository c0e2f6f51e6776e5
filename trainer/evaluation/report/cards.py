"""Evaluation cards: how each number of images was made, field by field.

A record that has a card shows what is in it, whatever its fields; of an older one, what the record says is shown under
the same names, and the rest is unknown. Evaluations with equal cards share a column.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.quality.card import DRAWN, NOTE, OF_METHODS, PROTOCOL, Card, differences, names_of, words_of
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import Cell, table

UNKNOWN = "unknown"
OF_DIGESTS = "_sha256"
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


def apart_in_words(card: Card, other: Card, told: Collection[str] = ()) -> list[str]:
    """Every setting of the protocol in which a card differs from another, with both values; those `told` are left out.

    Where one of the two says nothing of how images were drawn, that is one difference.
    """
    undrawn = [each.of_another_program for each in (card, other)]
    left_out, words = set(told), []
    if undrawn in ([True, False], [False, True]):
        left_out |= set(DRAWN)
        words.append(f"how {'its' if undrawn[0] else 'the other'} images were drawn is not known")
    return words + [_differs(*each) for each in differences(card, other) if each[0] not in left_out]


def _differs(name: str, mine: Any, its: Any) -> str:
    word = name.replace("_", " ")
    if mine is None:
        return f"{word} not known"
    if its is None:
        return f"{word} {_text(mine)}, of the other not known"
    return (
        f"{word} is another"
        if name.endswith(OF_DIGESTS) and mine and its
        else f"{word} {_text(mine)}, not {_text(its)}"
    )


def drawn_in_words(card: Card) -> str:
    """Sampler, steps and guidance, as far as they are known; "" where none is."""
    words = [] if card.sampler is None else [card.sampler]
    if card.steps is not None:
        words.append(f"{card.steps:,} steps")
    if card.guidance is not None:
        words.append("no guidance" if card.guidance == 1 else f"guidance {card.guidance:g}")
    low, high = card.guidance_low, card.guidance_high
    if low is not None and high is not None and (low, high) != (0, 1):
        words.append(f"from {low:g} to {high:g}")
    return ", ".join(words)


def own_in_words(found: Sequence[Card]) -> str:
    """What is the methods' own and not the same on all of the cards, with the values, in words; "" for nothing."""
    values = {name: list(dict.fromkeys(_text(getattr(card, name)) for card in found)) for name in OF_METHODS}
    return "; ".join(f"{name.replace('_', ' ')} {', '.join(of)}" for name, of in values.items() if len(of) > 1)


def in_doubt(card: Card, told: Collection[str] = ()) -> str:
    """Settings of the protocol that a card does not say, in words, but for those `told`; "" for none."""
    left_out, words = set(told), []
    if card.of_another_program:
        left_out |= set(DRAWN)
        words.append("how images were drawn")
    return ", ".join([*words, *(name.replace("_", " ") for name in card.unknown if name not in left_out)])


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
