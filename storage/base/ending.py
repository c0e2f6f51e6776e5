"""How a command ends: a short table of what came of it, and the commands that come next, each to be pasted as it is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from storage.base.console import say
from storage.base.programs import program

BETWEEN = "   ·   "


def rows(values: Mapping[str, object]) -> str:
    """A line a value, under each other; what is None or "" is left out."""
    kept = {name: text for name, value in values.items() if value is not None and (text := str(value))}
    width = max(map(len, kept), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in kept.items())


def command(package: str, *words: str | os.PathLike[str]) -> str:
    """A command line of one of the three programs, quoted for a shell, by the name that works where the user is."""
    return f"{program(package)} {shlex.join(map(str, words))}"


def say_next(*commands: str) -> None:
    """Print the commands that come next; empty ones are left out."""
    say(f"next: {BETWEEN.join(filter(None, commands))}")
