"""Labels as a data set spells them, and the numbers that they stand for. Nothing here is a guess.

A numeral is a number however it is spelled: `3`, `" 3"`, `"3.0"`, `"+3"`, `"03"`, `"3e0"`, digits of any script, with a
byte order mark or spaces around it; so is 3.0, and True is 1. An empty text, null, NaN and −1 are "no label". Whatever
else is text is a name. Numbers stay as they are; names are numbered in sorted order, or by the list of class names that
has them all. What cannot be taken so is refused, with the file and line and with the option that decides: numbers
beside names, 1.5, −3, numbers far apart, images without a label.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np

from pipeline.label_options import AS_FOUND, LabelOptions
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.index import MAX_LABEL, far_apart

NO_LABEL = -1
MAX_NAME = 1000  # characters of a class name
SHOWN_CHARACTERS = 60
INVISIBLE = "\ufeff\u200b\u2060"  # byte order mark, zero-width space, word joiner: str.strip leaves them
NUMERAL = re.compile(r"([+-]?\d{1,40})(\.0*)?|[+-]?\d{0,40}\.?\d{0,40}([eE][+-]?\d{1,4})?")
RENUMBER = "--renumber-labels numbers them anew, from 0"

Label = int | float | Decimal | str | bytes | None


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """A number a row (NO_LABEL for none), names by number, and what the user should know of how they came about.

    `in_text_order`: the numbers were given here, to names, and not by the data.
    """

    labels: list[int]
    class_names: dict[int, str]
    notes: tuple[str, ...] = ()
    in_text_order: bool = False


def number_labels(
    values: Sequence[Any],
    class_names: Mapping[Any, str],
    where: Callable[[int], str],
    options: LabelOptions = AS_FOUND,
) -> Numbered:
    """The labels of the rows as numbers. `class_names` names labels, which are spelled there as in `values`.

    `where(row)` says in a message where a label stands. Raises UserError where a label could only be guessed.
    """
    parsed = _parse_all(values, where)
    numbers = {value for value in parsed if isinstance(value, int | float)}
    words = {value for value in parsed if isinstance(value, str)}
    names = {read_label(label): name for label, name in class_names.items()}
    if options.renumber:
        return _renumbered(parsed, numbers, words, names)
    if numbers and words:
        _refuse_mixture(parsed, where)
    if words:
        numbered = _numbers_of_words(words, names, where(0))
        labels = [NO_LABEL if value is None else numbered[str(value)] for value in parsed]
        listed = {label: name for label, name in names.items() if isinstance(label, int)}
        named = {n: names.get(word, word) for word, n in numbered.items()} | listed
        return Numbered(labels=labels, class_names=named, in_text_order=not listed)
    wrong = {n for n in numbers if not isinstance(n, int) or n < 0 or n > MAX_LABEL}
    if wrong:
        row = next(row for row, value in enumerate(parsed) if value in wrong)
        rule = f"a label is a whole number from 0 to {MAX_LABEL:,}, {NO_LABEL} for none, or a name"
        raise UserError(f"{where(row)}: label {_spell(parsed[row])}: {rule}; mend it, or {RENUMBER}")
    labels = [NO_LABEL if value is None else int(value) for value in parsed]
    return Numbered(labels=labels, class_names={n: name for n, name in names.items() if isinstance(n, int)})


def refuse_far_apart(labels: Collection[int], named: Collection[int]) -> None:
    """Raise UserError where few numbers occur and the largest is large: a model has a row for every number up to it."""
    occur = {label for label in labels if label >= 0}
    known = occur | set(named)
    if occur and far_apart(max(occur), len(known)):
        raise UserError(
            f"labels are far apart: {len(occur)} occur and the largest is {max(occur):,}, and a model has a row for "
            f"every number up to it; pass --renumber-labels to number them 0 to {len(occur) - 1}"
        )


def refuse_lost(
    labels: Sequence[int], where: Callable[[int], str], options: LabelOptions, looked_in: str, kind_has_columns: bool
) -> list[str]:
    """Raise UserError where all or some images have no label and the user did not say so; else what is to be said."""
    missing = [row for row, label in enumerate(labels) if label == NO_LABEL]
    if options.unlabelled:
        return [f"no image has a label (−1 in all {len(labels)} rows), as --unlabelled asks"]
    if not missing:
        return []
    if len(missing) == len(labels):
        choose = "name what holds the labels with --label-column NAME, or " if kind_has_columns else ""
        raise UserError(
            f"no image has a label: {looked_in}; {choose}pass --unlabelled to store images without labels (−1)"
        )
    if not options.partly_labelled:
        raise UserError(
            f"{len(missing)} of {len(labels)} images have no label, first {where(missing[0])}; label them, or pass "
            "--partly-labelled to keep them without (−1), or --unlabelled to store no label at all"
        )
    return [f"{len(missing)} of {len(labels)} images have no label (−1), first {where(missing[0])}"]


def odd_names(class_names: Mapping[int, str], *, in_text_order: bool) -> list[str]:
    """What is odd about class names: numerals that are not in the order of their values, names that look alike.

    `in_text_order`: the names were sorted here to be numbered, by code points.
    """
    notes = []
    named = sorted((label, name) for label, name in class_names.items() if label >= 0 and name)
    values = [_value_of(name) for _, name in named]
    pairs = zip(zip(named, values, strict=True), zip(named[1:], values[1:], strict=True), strict=False)
    wrong = [(a, b) for (a, x), (b, y) in pairs if x is not None and y is not None and x > y]
    if wrong and None not in values:
        (label, name), (next_label, next_name) = wrong[0]
        notes.append(
            f"class names are numerals and not in the order of their values: label {label} is {shown(name)}, label "
            f"{next_label} is {shown(next_name)}; {RENUMBER}, by value"
        )
    elif in_text_order:
        notes += _numbers_in_text_order(named)
    folded: dict[str, set[str]] = {}
    for _, name in named:
        folded.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), set()).add(name)
    alike = [sorted(names) for names in folded.values() if len(names) > 1]
    if alike:
        notes.append(
            f"{len(alike)} classes have names that differ only in case, spaces or Unicode form, such as "
            f"{' and '.join(repr(name) for name in alike[0])}"
        )
    return notes


def _numbers_in_text_order(named: Sequence[tuple[int, str]]) -> list[str]:
    """A note where names differ in a number only, or begin with one, and 10 comes before 2 as in the order of texts."""
    for (label, name), (next_label, next_name) in itertools.pairwise(named):
        words, next_words = re.split(r"(\d{1,40})", name), re.split(r"(\d{1,40})", next_name)
        numbers, next_numbers = [int(n) for n in words[1::2]], [int(n) for n in next_words[1::2]]
        if words[::2] != next_words[::2]:
            if words[0] or next_words[0] or not (numbers and next_numbers):
                continue
            numbers, next_numbers = numbers[:1], next_numbers[:1]
        if numbers > next_numbers:
            return [
                f"class names are in the order of texts, not of the numbers in them: label {label} is {shown(name)}, "
                f"label {next_label} is {shown(next_name)}; where the numbers are meant, write them with leading zeros"
            ]
    return []


def read_label(value: Any) -> int | float | str | None:
    """A number, a name, or None for no label. Raises ValueError, which says why, for what is none of these."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8; save names as UTF-8") from None
    if isinstance(value, str):
        return _read_text(value)
    if value is None or isinstance(value, int):
        return None if value == NO_LABEL else value if value is None else int(value)
    if isinstance(value, float | Decimal):
        if value != value:
            return None  # NaN: what pandas makes of a gap
        number = float(value)  # a decimal of more digits than a float has is no label either
        return read_label(int(number)) if number.is_integer() and abs(number) < 2**53 else number
    raise ValueError(f"is a {type(value).__name__}, not one number or name")


def _read_text(text: str) -> int | float | str | None:
    text = text.strip().strip(INVISIBLE).strip()
    if not text:
        return None
    if len(text) > MAX_NAME:
        raise ValueError(
            f"has {len(text):,} characters, a class name may have {MAX_NAME:,}; name another column of labels"
        )
    numeral = text.replace("\u2212", "-")
    match = NUMERAL.fullmatch(numeral)
    if match is None or not any(character.isdecimal() for character in numeral):
        return text
    if match[1]:
        return read_label(int(match[1]))
    try:
        return read_label(float(numeral))
    except ValueError:
        return text


def _parse_all(values: Sequence[Any], where: Callable[[int], str]) -> list[int | float | str | None]:
    known: dict[Any, int | float | str | None] = {}
    parsed = []
    for row, value in enumerate(values):
        if isinstance(value, np.generic):
            value = value.item()
        try:
            label: Any = known[value]
        except KeyError:
            try:
                label = read_label(value)
            except ValueError as error:
                raise UserError(f"{where(row)}: label {_spell(value)} {error}") from None
            known[value] = label
        except TypeError:  # a list or a dict, which no label is
            raise UserError(
                f"{where(row)}: label {_spell(value)} is a {type(value).__name__}, not one number or name; name what "
                "holds the labels with --label-column, or pass --unlabelled"
            ) from None
        parsed.append(label)
    return parsed


def _refuse_mixture(parsed: Sequence[int | float | str | None], where: Callable[[int], str]) -> NoReturn:
    """Name the first of those that are fewer: a stray word among numbers, or the other way round."""
    words = [row for row, value in enumerate(parsed) if isinstance(value, str)]
    numbers = [row for row, value in enumerate(parsed) if not isinstance(value, str | None)]
    stray, what, others = (words, "name", numbers) if len(words) <= len(numbers) else (numbers, "number", words)
    raise UserError(
        f"{where(stray[0])}: label {_spell(parsed[stray[0]])} is a {what} ({len(stray)} of these), and {len(others)} "
        f"other labels are {'numbers' if what == 'name' else 'names'}, such as {_spell(parsed[others[0]])}; mend it, "
        "leave it empty for no label, or pass --renumber-labels to number all anew: numbers by value, then names"
    )


def _numbers_of_words(words: set[str], names: Mapping[Any, str], where: str) -> dict[str, int]:
    """Sorted order, or the numbers under which a list of class names has these words. Raises UserError."""
    listed = Counter(name.strip() for label, name in names.items() if isinstance(label, int) and name.strip())
    known = {word for word in words if word in listed}
    if not known:
        if listed and listed.total() != len(words):
            raise UserError(
                f"{where}: labels are {len(words)} names, such as {_spell(min(words))}, and the list of class names "
                f"has {listed.total()} others; remove the list, or make it name them"
            )
        return {word: number for number, word in enumerate(sorted(words))}
    unknown, twice = sorted(words - known), sorted(word for word in known if listed[word] > 1)
    if unknown or twice:
        why = f"{_spell(unknown[0])} is not in" if unknown else f"{_spell(twice[0])} stands twice in"
        raise UserError(f"{where}: labels are names, and {why} the list of class names; mend the list, or remove it")
    return {name.strip(): label for label, name in names.items() if isinstance(label, int) and name.strip() in words}


def _renumbered(
    parsed: Sequence[int | float | str | None],
    numbers: set[int | float],
    words: set[str],
    names: Mapping[Any, str],
) -> Numbered:
    """0 to K − 1: numbers in the order of their values (of their names, where these are numerals), then names."""
    wrong = [n for n in numbers if n in (float("inf"), float("-inf"))]
    if wrong:
        raise UserError(f"label {wrong[0]} is no number that could be ordered; mend it")
    spelled: dict[Any, str] = {label: names.get(label, _plain(label)) for label in (*numbers, *words)}
    order = [*_ordered(sorted(numbers), spelled), *_ordered(sorted(words), spelled)]
    new = {label: number for number, label in enumerate(order)}
    notes = []
    if order:
        last, first, end = len(order) - 1, _spell(order[0]), _spell(order[-1])
        notes.append(f"labels were numbered anew, 0 to {last}: 0 was {first}, {last} was {end}")
    return Numbered(
        labels=[NO_LABEL if value is None else new[value] for value in parsed],
        class_names={number: spelled[label] for label, number in new.items()},
        notes=tuple(notes),
        in_text_order=bool(words),
    )


def _ordered(labels: list[Any], spelled: Mapping[Any, str]) -> list[Any]:
    values: dict[Any, Any] = {label: _value_of(spelled[label]) for label in labels}
    return labels if None in values.values() else sorted(labels, key=values.__getitem__)


def _value_of(name: str) -> tuple[float, ...] | None:
    """What orders a name without letters, `10` after `2`: its number, else the numbers in it; None for other names."""
    name = unicodedata.normalize("NFKC", name)  # ² is 2
    if len(name) > SHOWN_CHARACTERS or any(character.isalpha() for character in name):
        return None
    if re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", name):  # −1 too, which is no label
        return (float(name),)
    digits = re.findall(r"\d+", name)
    number = _read_text(name)
    return (float(number),) if isinstance(number, int | float) else tuple(map(float, digits)) if digits else None


def _plain(label: Any) -> str:
    return label if isinstance(label, str) else f"{label}"


def _spell(value: Any) -> str:
    text = shown(repr(value) if not isinstance(value, int | float) else f"{value}")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
