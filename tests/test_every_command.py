"""What holds for every command of the three programs: a spelling of switches, errors that name it, what comes next.

In this process: a new one takes seconds to import what a command needs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import __main__ as pipeline_main
from pipeline import commands as of_pipeline
from storage import __main__ as storage_main
from storage import commands as of_storage
from storage.base.commands import imported
from storage.base.console import Parser
from storage.base.errors import UserError
from storage.base.options import add_options, as_words, given_options
from tests.commands import run_here
from tests.stores import FEATURES, make_store
from trainer import __main__ as trainer_main
from trainer import commands as of_trainer

Main = Callable[[Sequence[str]], int]
PROGRAMS: dict[str, tuple[Main, Any]] = {
    "storage": (storage_main.main, of_storage),
    "pipeline": (pipeline_main.main, of_pipeline),
    "trainer": (trainer_main.main, of_trainer),
}
ALL = [(program, name) for program, (_, commands) in PROGRAMS.items() for name in commands.COMMANDS]


def parser_of(program: str, name: str) -> tuple[Parser, type]:
    """As `run_one` makes it."""
    config_class = imported(PROGRAMS[program][1].COMMANDS[name].options)
    parser = Parser(prog=f"{program} {name}")
    if hasattr(config_class, "add_options"):
        config_class.add_options(parser, [name, "--help-all"])
    else:
        add_options(parser, config_class)
    return parser, config_class


def switches() -> list[tuple[str, str, str]]:
    """Every switch of every command: an option of which argparse was told to take a value or none."""
    return [
        (program, name, action.option_strings[0])
        for program, name in ALL
        for action in parser_of(program, name)[0]._actions
        if action.nargs == "?" and action.option_strings
    ]


SWITCHES = switches()


def words_for(parser: Parser) -> list[str]:
    """What must be there besides."""
    words: list[str] = []
    for action in parser._actions:
        if action.option_strings and action.required:
            words += [action.option_strings[0], "1"]
        elif not action.option_strings and action.nargs != argparse.REMAINDER:
            words.append("x")
    return words


def test_there_are_switches_in_all_three_programs() -> None:
    assert {program for program, _, _ in SWITCHES} == set(PROGRAMS)
    assert len(SWITCHES) > 25
    actions = [action for program, name in ALL for action in parser_of(program, name)[0]._actions]
    assert not [each for each in actions if isinstance(each, argparse._StoreTrueAction)], (
        "spelled otherwise than others"
    )


@pytest.mark.parametrize(("program", "name", "flag"), SWITCHES)
def test_a_switch_is_spelled_alike_everywhere(program: str, name: str, flag: str) -> None:
    parser, _ = parser_of(program, name)
    needed = words_for(parser)
    (action,) = (action for action in parser._actions if flag in action.option_strings)

    def value(*words: str) -> Any:
        texts = vars(parser.parse_args([*needed, *words]))
        if not isinstance(texts[action.dest], str):
            return texts[action.dest]
        from storage.base.options import parse_text

        return parse_text(flag, texts[action.dest], bool)

    assert [value(flag), value(flag, "true"), value(f"{flag}=true"), value(f"{flag}=True")] == [True] * 4
    no = f"--no-{flag.removeprefix('--')}"
    assert [value(no), value(flag, "false"), value(f"{flag}=false")] == [False] * 3
    with pytest.raises(UserError, match=rf"^{flag} must be true or false, got 'yes'"):
        value(f"{flag}=yes")


@pytest.mark.parametrize(("program", "name"), ALL)
def test_an_error_is_one_line_that_names_the_command(
    program: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, commands = PROGRAMS[program]
    status, out, err = run_here(main, commands.PROG, [name, "--no-such-option"], capsys)
    if (program, name) == ("pipeline", "launch"):  # whose rest is another command's line
        assert status == 2
        return
    assert (status, out) == (2, "")
    assert err.startswith(f"python -m {program} {name}: error: ")
    assert err.count("\n") == 1
    assert err.endswith(f"(see python -m {program} {name} --help)\n")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("no such store"), "error: no such store"),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: No such file or directory: x"),
        (ModuleNotFoundError(name="torch"), "error: this needs the package torch; "),
        (KeyboardInterrupt(), "interrupted; what was finished is kept"),
    ],
)
@pytest.mark.parametrize(("program", "name"), ALL)
def test_whatever_ends_a_command_names_it(
    program: str, name: str, error: BaseException, says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    main, commands = PROGRAMS[program]

    def fails(config: object) -> None:
        raise error

    def of_command(spelling: str) -> Any:
        return fails if spelling == commands.COMMANDS[name].run else imported(spelling)

    class Anything:
        """Options that any words are."""

        @staticmethod
        def add_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
            pass

        @staticmethod
        def from_options(texts: Any) -> None:
            pass

    options = commands.COMMANDS[name].options
    monkeypatch.setattr(
        "storage.base.commands.imported", lambda spelling: Anything if spelling == options else of_command(spelling)
    )
    status, out, err = run_here(main, commands.PROG, [name], capsys)
    assert (status, out) == (130 if isinstance(error, KeyboardInterrupt) else 2, "")
    assert err.startswith(f"python -m {program} {name}: {says}")


def test_before_a_command_is_known_the_program_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run_here(storage_main.main, of_storage.PROG, ["info", "nowhere"], capsys)
    for main, commands in PROGRAMS.values():
        assert run_here(main, commands.PROG, [], capsys)[2].startswith(f"{commands.PROG}: error: ")


@pytest.mark.parametrize(("program", "name"), ALL)
def test_words_of_an_object_make_that_object(program: str, name: str) -> None:
    parser, config_class = parser_of(program, name)
    if hasattr(config_class, "add_options"):
        return
    words = words_for(parser)
    for flag in [flag for p, n, flag in SWITCHES if (p, n) == (program, name)]:
        words.append(flag)
    try:
        config = config_class(**given_options(config_class, vars(parser.parse_args(words))))
    except UserError:  # of two that exclude each other, or a word that is none of a few
        return
    again = config_class(**given_options(config_class, vars(parser.parse_args(as_words(config)))))
    assert again == config


def next_commands(out: str) -> list[list[str]]:
    """The commands that a command ends with, as words."""
    lines = [line.removeprefix("next: ") for line in out.splitlines() if line.startswith("next: ")]
    assert len(lines) == 1, "one line"
    assert out.splitlines()[-1] == f"next: {lines[0]}", "the last one"
    return [shlex.split(command) for command in lines[0].split("   ·   ")]


STORAGE = {
    "ls": ["STORE"],
    "info": ["STORE"],
    "verify": ["STORE"],
    "verify, deep": ["STORE", "--deep"],
    "diff": ["STORE", "STORE"],
    "diff of two": ["STORE", "OTHER"],
    "statistics": ["STORE", FEATURES],
    "derive": ["STORE", FEATURES, "--codec", "int8", "--workers", "1"],
    **{f"export, {to}": ["STORE", "--to", to, "--out", f"OUT.{to}"] for to in ("hdf5", "npy", "parquet", "webdataset")},
}


@pytest.mark.parametrize("case", STORAGE)
def test_what_a_command_of_storage_ends_with_can_be_pasted(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with spaces & 'quotes'"
    make_store(folder / "STORE")
    if case == "diff of two":
        make_store(folder / "OTHER", suffix="-other")
    words = [str(folder / word) if word.startswith(("STORE", "OTHER", "OUT")) else word for word in STORAGE[case]]
    name = case.partition(",")[0].partition(" of")[0]
    status, out, err = run_here(storage_main.main, of_storage.PROG, [name, *words], capsys)
    assert status == (1 if case == "diff of two" else 0), err
    for following in next_commands(out):
        if following[:3] == ["python", "-m", "storage"]:
            status, _, err = run_here(storage_main.main, of_storage.PROG, following[3:], capsys)
            assert status == 0, (following, err)
        else:
            (line,) = (line for line in out.splitlines() if line.startswith("next: "))
            shell = line.removeprefix("next: ").replace("python", shlex.quote(sys.executable), 1)
            done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout
