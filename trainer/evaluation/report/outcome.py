"""What `report` prints when it has ended: the page's own first sentence, where it lies, and what would tell more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from storage import space
from storage.base import ending
from storage.base.shown import shown
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.verdict import Verdict, verdict


def outcome(records: Sequence[RunRecord], page: Path) -> tuple[str, str]:
    """A few lines, and the command that comes next: the first of what is missing, else one that shows the page."""
    answer = verdict(records, methods_of(records))
    rows = {
        "answer": answer.sentence,
        "runs": ", ".join(record.name for record in records),
        "page": f"{page}, {space.size(page.stat().st_size)}",
    }
    if answer.doubt:
        rows["perhaps unlike"] = f"{answer.doubt} (known of none of the runs compared)"
    if answer.missing:
        rows["missing"] = f"{len(answer.missing)}, the first: {answer.missing[0][0]} (the page lists the commands)"
    return "\n".join(map(shown, ending.rows(rows).splitlines())), _next(answer, page)


def _next(answer: Verdict, page: Path) -> str:
    commands = [command for _, command in answer.missing if command]
    if commands:
        return commands[0]
    folder = str(page.absolute().parent)
    return shlex.join(["python", "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", folder])
