"""What a run says of itself at the terminal: how it differs from its preset, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.base import ending
from storage.base.options import flag_of, spelled
from storage.base.shown import LONGEST
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import leaves
from trainer.run.folder import RunFolder

OF_EVERY_RUN = {"preset", "store", "run"}
MOST_SHOWN = 12


def settings_line(config: TrainConfig) -> str:
    """The preset and what differs from it, as options; the file has all settings."""
    of_preset = {name: value for name, value, _ in leaves(preset(config.preset))}
    changed = [
        f"{flag_of(name)} {_shown(value)}"
        for name, value, _ in leaves(config)
        if name not in OF_EVERY_RUN and value != of_preset[name]
    ]
    left = len(changed) - MOST_SHOWN
    shown = changed[:MOST_SHOWN] + ([f"and {left} more"] if left > 0 else [])
    but = f", but {', '.join(shown)}" if shown else ""
    return f"{config.preset}{but} (all in {RunFolder(config.run).config})"


def outcome(summary: Mapping[str, Any]) -> str:
    """The summary of a run in a few lines."""
    first, last = summary["first"], summary["last"]
    speed = "complete before, nothing trained"
    if summary["steps_now"]:
        speed = f"{summary['steps_now']} now, {summary['steps_per_s']:g} steps/s, {summary['images_per_s']:g} images/s"
    skipped = f", {summary['steps_skipped']} skipped" if summary["steps_skipped"] else ""
    rows = {
        "steps": f"{summary['steps']}{skipped}; {speed}",
        "device": f"{summary['device']}, {summary['seconds']:.0f} s",
    }
    for loss in ("loss", "denoising_loss", "alignment_loss"):
        if last.get(loss) and first.get(loss) is not None:
            since = f"{first[loss]:.4f} (step {first['step']}) → " if first["step"] != last["step"] else ""
            rows[loss.replace("_", " ")] = f"{since}{last[loss]:.4f}"
    rows |= {"checkpoint": summary["checkpoint"]}
    return ending.rows(rows)


def _shown(value: Any) -> str:
    text = spelled(value) or "''"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
