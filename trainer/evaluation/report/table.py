"""A table of HTML whose columns sort: cells with a smaller line below, a piece of a run's line before its name.

Every text is escaped, for HTML and for what a terminal or a reader would obey. The sorting is the page's script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.report.charts import colour, dash, escaped

NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a table shows, what it is sorted by (None: last), and a smaller line below."""

    text: str
    key: float | str | None = None
    note: str = ""


def number_cell(value: float | None, form: str, note: str = "") -> Cell:
    """A number as `form` spells it; nothing for None."""
    return Cell(text=NOTHING) if value is None else Cell(text=format(value, form), key=value, note=note)


def table(columns: dict[str, list[Cell]], *, label: str, swatches: bool = False) -> str:
    """A table that scrolls in itself, the first column being the rows' headings; the page's script sorts it."""
    first, *others = columns.values()
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_alignment(cells)}><button type="button">{_heading(title)}</button></th>'
        for title, cells in columns.items()
    )
    rows = []
    for i, name in enumerate(first):
        key = f'scope="row" data-key="{escaped(str(name.key))}"'
        head = f"<th {key}>{swatch(i) if swatches else ''}{_shown(name)}</th>"
        rows.append(f"<tr>{head}{''.join(_cell(cells[i], _alignment(cells)) for cells in others)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heading(title: str) -> str:
    """A dotted setting may be broken after its dots and underscores, so that columns are as narrow as their values."""
    return escaped(title).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _alignment(cells: Sequence[Cell]) -> str:
    return "" if any(isinstance(cell.key, str) for cell in cells) else ' class="number"'


def _cell(cell: Cell, alignment: str) -> str:
    key = "" if cell.key is None else f' data-key="{escaped(str(cell.key))}"'
    return f"<td{alignment}{key}>{_shown(cell)}</td>"


def _shown(cell: Cell) -> str:
    return escaped(cell.text) + (f"<small>{escaped(cell.note)}</small>" if cell.note else "")


def swatch(number: int) -> str:
    """A piece of a run's line."""
    style = f"stroke:{colour(number)}"
    line = f'<line x1="1" x2="19" y1="5" y2="5" style="{style}" stroke-dasharray="{dash(number)}"/>'
    return f'<svg class="swatch" viewBox="0 0 20 10" aria-hidden="true">{line}</svg>'
