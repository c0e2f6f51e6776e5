"""A table of HTML that is never wider than the page: cells with a smaller line below, a swatch before a run's name.

How wide its cells have to be is estimated from their texts, and the page's script sees where a font is wider. Where its
box is narrower than that, each row becomes a block: its name on top, which stays in view, and below it a line a column,
"heading … value". Columns sort by the page's script. Every text is escaped, for HTML and for what a terminal or a
reader would obey; a long name may be broken after its points, signs and slashes, and in the middle of a word only where
nothing else fits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.report.charts import escaped

NOTHING = "–"
LETTER, SMALL, PADDING = 9.0, 7.4, 26.0  # pixels: a letter, one of a smaller line, what is around a cell
LONGEST_LINE = 30  # letters of a cell that stay on one line; longer ones wrap
STEPS = (480, 720, 960, 1200)  # widths of a box, in pixels, below which a table turns into blocks
ALWAYS = "always"
BREAKS = re.compile(r"&[#\w]+;|[^\w\s(\[](?=[^\W\d])|(?<=\w)[-/_=](?=\w)")  # an entity of HTML stays whole


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a table shows, what it is sorted by (None: last), a smaller line below, and a picture made here."""

    text: str
    key: float | str | None = None
    note: str = ""
    svg: str = ""
    before: str = ""


def number_cell(value: float | None, form: str, note: str = "") -> Cell:
    """A number as `form` spells it; nothing for None."""
    return Cell(text=NOTHING) if value is None else Cell(text=format(value, form), key=value, note=note)


def breakable(text: str) -> str:
    """Escaped text with places at which it may be broken."""
    return BREAKS.sub(lambda found: found.group() + "<wbr>" * (found.group()[0] != "&"), escaped(text))


def table(columns: dict[str, list[Cell]], *, label: str, sortable: bool = True) -> str:
    """A table, the first column being the rows' headings."""
    first, *others = columns.values()
    heads = "".join(_head(title, cells, sortable) for title, cells in columns.items())
    titles = list(columns)[1:]
    rows = []
    for i, name in enumerate(first):
        head = f'<th scope="row"{_key(name)}>{_shown(name)}</th>'
        cells = [_cell(of[i], _alignment(of), title) for of, title in zip(others, titles, strict=True)]
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    kind = f'class="fit-{fits(columns)}{" sortable" if sortable else ""}"'
    return (
        f'<div class="tablebox" role="region" aria-label="{escaped(label)}"><table {kind}>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def fits(columns: dict[str, list[Cell]]) -> str:
    """The step of STEPS in which the columns find room, or ALWAYS for more of them: blocks at any width."""
    width = sum(_width(title, cells) for title, cells in columns.items())
    return next((str(step) for step in STEPS if width <= step), ALWAYS)


def _width(title: str, cells: Sequence[Cell]) -> float:
    """Pixels that a column needs."""
    words = max((len(word) for word in re.split(r"[\s._\-/]+", title)), default=0) + 2
    text = max((min(len(cell.text), LONGEST_LINE) for cell in cells), default=0)
    note = max((len(word) for cell in cells for word in cell.note.split()), default=0)
    picture = 200.0 if any(cell.svg for cell in cells) else 0.0
    swatch = 27.0 if any(cell.before for cell in cells) else 0.0
    note_width = min(note, LONGEST_LINE) * SMALL
    return max(words * SMALL + 6, text * LETTER + swatch, note_width, picture) + PADDING


def stacking_css(rules: str) -> str:
    """The page's rules for tables as blocks, in which @ stands for the table, at every step and always."""
    steps = [f"@container (max-width: {step}px) {{ {rules.replace('@', f'table.fit-{step}')} }}" for step in STEPS]
    return "\n".join([*steps, rules.replace("@", f"table.fit-{ALWAYS}")])


def _head(title: str, cells: Sequence[Cell], sortable: bool) -> str:
    if not sortable:
        return f'<th scope="col"{_alignment(cells)}>{breakable(title)}</th>'
    button = f'<button type="button">{breakable(title)}</button>'
    return f'<th scope="col" aria-sort="none"{_alignment(cells)}>{button}</th>'


def _alignment(cells: Sequence[Cell]) -> str:
    return "" if any(isinstance(cell.key, str) for cell in cells) else ' class="number"'


def _key(cell: Cell) -> str:
    return "" if cell.key is None else f' data-key="{escaped(str(cell.key))}"'


def _cell(cell: Cell, alignment: str, title: str) -> str:
    return f'<td{alignment}{_key(cell)} data-label="{escaped(title)}">{_shown(cell)}</td>'


def _shown(cell: Cell) -> str:
    long = len(cell.text) > LONGEST_LINE  # a short one has no place at which to break: even unwrapped, it would
    value = f'<span class="value{" long" if long else ""}">{cell.before}'
    text = f"{value}{breakable(cell.text) if long else escaped(cell.text)}</span>" if cell.text else ""
    return text + cell.svg + (f"<small>{breakable(cell.note)}</small>" if cell.note else "")
