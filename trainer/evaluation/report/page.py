"""`python -m trainer report`: one HTML page about any number of runs, which loads nothing and needs no network.

In the order in which a reader asks: which method is best and how sure that is (`verdict`), samples side by side,
curves, every number, settings, how the numbers were made (`cards`), and where runs and stores are from. What was not
measured is left out. What was measured otherwise than that of other runs stands in columns and charts of its own, or is
left out and named with the command that measures it alike (`alike`). The page's frame, style and script are
`report_page.html`, `report.css` and `report.js`; pictures are in the page, which stays below 5 MB with them.

Runs come from anywhere: every text of theirs is escaped, for HTML and for what a terminal or a reader would obey.
"""

from __future__ import annotations

import dataclasses
import html
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage.base.files import write_atomic
from trainer.evaluation.report import cards, curves, results, settings
from trainer.evaluation.report.charts import escaped
from trainer.evaluation.report.methods import LONGEST_NAME, Method, differing, methods_of, setting
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.samples import samples, store_pictures
from trainer.evaluation.report.table import NOTHING, stacking_css
from trainer.evaluation.report.verdict import Verdict, verdict

HERE = Path(__file__).parent
PART = re.compile(r"<!--(\w+)-->")
LONGEST_VALUES = 33
MOST_COMMANDS = 6
INTERVALS = (
    "Below a measure of images: its 95 % interval by the choice of the images that were drawn, which says nothing of "
    "another seed's training"
)
STACKED = """
@, @ tbody, @ tr, @ th, @ td { display: block; }
@ thead { display: none; }
@ tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
@ tr { border-bottom: 1px solid var(--edge); padding-bottom: 6px; min-width: 0; }
@ tbody th { position: sticky; top: 0; z-index: 1; background: var(--card); border: 0; padding: 9px 12px 5px;
  border-radius: 10px; }
@ tbody td { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px; border: 0; padding: 2px 12px;
  text-align: right; }
@ tbody td::before { content: attr(data-label); color: var(--soft); font-size: .85rem; text-align: left; max-width: 60%;
  overflow-wrap: break-word; }
@ td .value { margin-left: auto; overflow-wrap: anywhere; }
@ td .value.long { text-align: right; }
@ td small { flex-basis: 100%; }
@ td .strip { margin-left: auto; max-width: 200px; width: 60%; }
"""


def write_report(runs: Sequence[Path], out: Path, title: str) -> list[Path]:
    """Write the page and return its path. Raises UserError."""
    write_page(read_runs(runs), out, title)
    return [out]


def write_page(records: Sequence[RunRecord], out: Path, title: str = "") -> None:
    """Write the page about runs that were read."""
    write_atomic(out, page(records, title or _title(records), beside=out.absolute().parent).encode(), "report")
    n_apart = len(results.not_compared(records))
    if n_apart:
        print(f"{n_apart} measurements were made otherwise than others; the page says how to compare", file=sys.stderr)


def page(records: Sequence[RunRecord], title: str, *, beside: Path | None = None, real: bool = True) -> str:
    """The page's HTML. Pictures of stores are looked for in `beside` too; without `real`, no source is read."""
    records = named_shortly(records)
    methods = methods_of(records)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    answer = verdict(records, methods)
    parts = {
        "title": escaped(title),
        "summary": f"{_counted(records, methods)} · {html.escape(made)}",
        "answer": answered(answer, records),
        "samples": samples(records, methods, real=real),
        "curves": curves_section(records, methods),
        "numbers": numbers(records, methods),
        "cards": cards.cards(records),
        "settings": settings.differences(records, methods) * (len(records) > 1) + settings.shared(records),
        "origin": origin(records, methods, beside),
        "style": (HERE / "report.css").read_text(encoding="utf-8").replace("<!--stacked-->", stacking_css(STACKED)),
        "script": (HERE / "report.js").read_text(encoding="utf-8"),
    }
    # In one pass, so that what a run says cannot name a part.
    return PART.sub(lambda found: parts[found[1]], (HERE / "report_page.html").read_text(encoding="utf-8"))


def named_shortly(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs whose names are too long for a legend under the settings that tell them apart, which are in such names."""
    columns = differing(records)
    values = [" · ".join(setting(run, name) or NOTHING for name in columns) for run in records]
    longest, longest_value = max(len(run.name) for run in records), max(map(len, values))
    if longest <= LONGEST_NAME or longest_value >= min(longest, LONGEST_VALUES) or len(set(values)) < len(records):
        return list(records)
    return [dataclasses.replace(run, name=value) for run, value in zip(records, values, strict=True)]


def _title(records: Sequence[RunRecord]) -> str:
    if len(records) == 1:
        return records[0].name
    folders = sorted({record.path.absolute().parent.name for record in records})
    return f"Runs in {', '.join(folders)}"


def _counted(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    if len(methods) == len(records):
        return runs
    return (
        f"{len(methods)} method{'s' if len(methods) > 1 else ''}, {runs} (those of a method differ in the seed alone)"
    )


def answered(answer: Verdict, records: Sequence[RunRecord]) -> str:
    """HTML: the sentence, the ranking, how it was measured, and what to run for what is missing."""
    how = "".join(f"<li>{escaped(line)}</li>" for line in answer.how)
    return (
        f'<p class="verdict {answer.outcome}">{escaped(answer.sentence).replace(" ± ", "&nbsp;±&nbsp;")}</p>'
        + results.ranking_table(answer, records)
        + (f'<ul class="how">{how}</ul>' if how else "")
        + results.commands(
            f"What is still missing ({len(answer.missing)})" if answer.is_answered else "What would answer it:",
            answer.missing,
            MOST_COMMANDS,
            folded=answer.is_answered,
        )
    )


def curves_section(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: controls, legend, charts."""
    drawn = curves.figures(records, methods)
    if not drawn:
        return "<p>Nothing is logged yet.</p>"
    over = {axis for each in drawn for axis, _ in each.charts}
    looks = [look for look in curves.LOOKS if any(look in key for each in drawn for key in each.charts)]
    first = next(iter(drawn[0].charts))
    axes = {key: axis.label for key, axis in curves.axes(records).items() if key in over}
    chosen = [
        _choice("axis", "Over", axes, first[0]),
        _choice("look", "Show", {look: curves.LOOKS[look] for look in looks}, first[1]),
    ]
    controls = f'<div class="controls" hidden>{"".join(chosen)}</div>' if any(chosen) else ""
    return f'{results.legend(records, methods)}{controls}<div class="cards">{curves.shown(drawn)}</div>'


def _choice(kind: str, heading: str, values: dict[str, str], first: str) -> str:
    if len(values) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" data-value="{value}" aria-pressed="{str(value == first).lower()}">'
        f"{escaped(text[0].upper() + text[1:])}</button>"
        for value, text in values.items()
    )
    return f'<div role="group" aria-label="{heading}">{heading} {buttons}</div>'


def numbers(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: every measure, of methods and of runs, and what is not compared."""
    of_methods = results.methods_table(records, methods)
    of_runs = results.runs_table(records, methods)
    heading = "<p>Mean and standard deviation over a method's seeds; of one seed, its value.</p>" if of_methods else ""
    every = "<h3>Every run</h3>" if of_methods else ""
    with_interval = any(m.interval for run in records for line in run.evaluations for m in line.metrics.values())
    n_images = results.images_behind(records)
    of_images = ", and how many images it is of." if n_images is None else f". All are of {n_images:,} images."
    intervals = f"<p>{INTERVALS}{of_images}</p>" if with_interval else ""
    return f"{heading}{of_methods}{every}{intervals}{of_runs}{explained(records)}{results.apart(records)}"


def explained(records: Sequence[RunRecord]) -> str:
    """HTML: what each column's number is, in words."""
    items = "".join(
        f"<div><dt>{escaped(heading)}</dt><dd>{escaped(text)}</dd></div>"
        for heading, text in results.in_words(records).items()
    )
    return f"<details open><summary>What each number is</summary><dl>{items}</dl></details>" if items else ""


def origin(records: Sequence[RunRecord], methods: Sequence[Method], beside: Path | None) -> str:
    """HTML: code, machines, stores and what is in these."""
    pictures = store_pictures(records, beside)
    return (
        f"{settings.provenance(records, results.names(records, methods))}<h3>Stores</h3>{settings.stores(records)}"
        + (f"<h3>What the stores hold</h3>{pictures}" if pictures else "")
    )
