"""What `generate` prints when it has ended: what was drawn and how, where it lies, and the command that measures it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from storage.base import ending
from storage.base.shown import shown
from trainer.evaluation.generate.image_files import SETTINGS_FILE, n_written


def outcome(written: Sequence[Path]) -> str:
    """A few lines about the folder of images, the grid and the packed file that `generate` returned."""
    folder, grid, *packed = written
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    guidance = settings.get("sample.guidance")
    heun = " (Heun)" if settings.get("sample.heun") else ""
    drawn = f"{settings.get('sample.sampler')}{heun}, {settings.get('sample.steps')} steps"
    drawn += ", without guidance" if guidance == 1 else f", guidance {guidance}"
    drawn += " away from a weaker model" if settings.get("weaker_sha256") else ""
    rows = {
        "images": f"{n_written(folder):,} in {folder}",
        "drawn": f"after {settings.get('step'):,} steps of training, by {drawn}, seed {settings.get('seed')}",
        "grid": grid,
        "packed": packed[0] if packed else None,
    }
    return shown_lines(ending.rows(rows))


def shown_lines(text: str) -> str:
    """Lines in which names cannot steer the terminal."""
    return "\n".join(map(shown, text.splitlines()))


def evaluation_of(run: Path, images: Path) -> str:
    """The command line that measures images of a run against the originals of its store."""
    from trainer.evaluation.report.run_record import read_runs
    from trainer.evaluation.report.verdict import evaluation_command

    (record,) = read_runs([run])
    return evaluation_command([record], record, images)
