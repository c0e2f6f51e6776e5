"""The commands of a program, `python -m storage` say: a table of names, options and functions, run by one of them.

What a command needs is imported when that command is named, so `--help` of another one costs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from storage.base.console import EXIT_OK, Parser, speak_as
from storage.base.options import add_options, close_matches, given_options
from storage.base.programs import as_called
from storage.base.waiting import waiting


@dataclass(frozen=True)
class Command:
    """One command. `options` and `run` are spelled "module:name" and imported when the command is named.

    `options` is a dataclass (`storage.base.options`), or any class with the functions `add_options(parser, argv)` and
    `from_options(texts)`. `run` takes an object of it and returns the exit status, or None for 0.
    """

    help: str
    options: str
    run: str


def run_one(prog: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    """Run the command that `argv` names; returns its exit status. Raises UserError."""
    parser = Parser(
        prog=prog, description=as_called(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, command in commands.items():
        parsers.add_parser(name, help=as_called(command.help), description=as_called(command.help))
    named = next((word for word in argv if not word.startswith("-")), "")
    if named not in commands:
        if named:
            names = ", ".join(commands)
            parser.error(f"unknown command {named}; the commands are {names}{close_matches(named, commands)}")
        parser.parse_args(argv)  # ends with --help, or with what is missing
    command, chosen = commands[named], parsers.choices[named]
    speak_as(chosen.prog)
    with _loading():
        options_class = imported(command.options)
    if hasattr(options_class, "add_options"):
        options_class.add_options(chosen, argv)
    else:
        add_options(chosen, options_class)
    texts, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in chosen._actions for flag in action.option_strings]
        kind = "option" if unknown[0].startswith("-") else "argument"
        chosen.error(f"unknown {kind} {unknown[0]}{close_matches(unknown[0].partition('=')[0], known)}")
    if hasattr(options_class, "from_options"):
        config = options_class.from_options(vars(texts))
    else:
        config = options_class(**given_options(options_class, vars(texts)))
    with _loading():
        run = imported(command.run)
    status = run(config)
    return EXIT_OK if status is None else int(status)


def _loading() -> AbstractContextManager[None]:
    """Says that libraries are being loaded, seconds from a cold disk; ranks but the first say nothing."""
    return waiting("loading libraries", hidden=os.environ.get("RANK", "0") != "0")


def imported(spelling: str) -> Any:
    """What "module:name" names."""
    module, _, name = spelling.partition(":")
    return getattr(importlib.import_module(module), name)
