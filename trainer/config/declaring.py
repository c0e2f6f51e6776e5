"""How a setting is declared, and the checks that several settings share; the settings are in `schema.py`."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from storage.base import options
from storage.base.errors import UserError
from storage.base.options import flag_of

AS_NOW = object()


def option(
    default: object,
    help_text: str,
    *,
    free: bool = False,
    before: object = AS_NOW,
    of_alignment: bool = False,
    often: bool = False,
) -> Any:
    """A setting (`storage.base.options`); a *free* one may change when a run is resumed.

    `before`: what runs did that were saved before the setting existed, where that is not today's default.
    `of_alignment`: a run without alignment does not depend on it, so an ablation does not vary it there.
    `often`: in the short help.
    """
    before = default if before is AS_NOW else before
    return options.option(default, help_text, free=free, before=before, of_alignment=of_alignment, often=often)


def section(default: type) -> Any:
    """A nested config; its first docstring line heads its options in `--help`."""
    return field(default_factory=default)


def flag(topic: str, name: str) -> str:
    """The command line's spelling of a field: `--loss.projection-weight`."""
    return flag_of(f"{topic}.{name}" if topic else name)


def at_least(config: object, topic: str, name: str, least: int) -> None:
    """Raise UserError when the field is below `least` (or not a number, or infinite)."""
    if not least <= getattr(config, name) < math.inf:
        raise UserError(f"{flag(topic, name)} must be at least {least}, got {getattr(config, name)}")


def in_unit_interval(config: object, topic: str, name: str) -> None:
    """Raise UserError when the field is outside [0, 1]."""
    if not 0 <= getattr(config, name) <= 1:
        raise UserError(f"{flag(topic, name)} must be in [0, 1], got {getattr(config, name)}")
