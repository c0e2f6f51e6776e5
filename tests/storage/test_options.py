"""Options made from dataclasses: what is given arrives with its type, what is wrong is one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.base.commands import Command, run_one
from storage.base.console import Parser
from storage.base.errors import UserError
from storage.base.options import (
    add_options,
    argument,
    check_ranges,
    given_options,
    option,
    parse_text,
    required,
    spelled,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A topic."""

    weight: float = option(0.5, "100 % of it")
    names: tuple[str, ...] = option((), "several")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every type that there is."""

    out: Path = required("where to")
    n: int = option(3, "how many")
    flip: bool = option(False, "mirror")
    keep: bool = option(True, "keep them")
    mode: Literal["a", "b"] | None = option(None, "which")
    place: Path | str | None = option(None, "a path or a URL")
    times: tuple[float, ...] = option((0.5,), "when", spaced=True)
    hidden: int = 7
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Positional:
    """Beside a switch."""

    runs: tuple[Path, ...] = argument("folders")
    deep: bool = option(False, "thoroughly")


def parse(config_class: type, *argv: str) -> dict[str, Any]:
    parser = Parser(prog="x")
    add_options(parser, config_class)
    return given_options(config_class, vars(parser.parse_args(argv)))


def test_what_is_given_arrives_and_nothing_else() -> None:
    assert parse(Options, "--out", "o") == {"out": Path("o")}
    words = "--out o --n 4 --flip --no-keep --mode b --place s3://x/y --times 0 1 --inner.weight 2 --inner.names a,b"
    assert parse(Options, *words.split()) == {
        "out": Path("o"),
        "n": 4,
        "flip": True,
        "keep": False,
        "mode": "b",
        "place": "s3://x/y",
        "times": (0.0, 1.0),
        "inner.weight": 2.0,
        "inner.names": ("a", "b"),
    }
    assert parse(Options, "--out", "o", "--flip=false", "--keep", "true", "--place", "x/y") == {
        "out": Path("o"),
        "flip": False,
        "keep": True,
        "place": Path("x/y"),
    }


def test_a_folder_s_path_ends_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie beside it under its name; an empty path is one that is not given."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for text, path in ((".", "a/b"), ("./", "a/b"), ("..", "a"), ("../../a/..", "")):
        assert parse(Options, "--out", text) == {"out": tmp_path / path}
        assert parse(Options, "--out", "o", "--place", text)["place"] == tmp_path / path
    assert parse_text("--x", "", Path) == Path()
    assert parse(Options, "--out", "./c") == {"out": Path("c")}


def test_an_empty_path_among_several_is_a_forgotten_variable() -> None:
    with pytest.raises(UserError, match="one of RUNS is empty; name paths"):
        parse(Positional, "a", "")


def test_a_switch_beside_positional_arguments_takes_none_of_them() -> None:
    assert parse(Positional, "--deep", "a", "b") == {"runs": (Path("a"), Path("b")), "deep": True}
    assert parse(Positional, "a", "--no-deep") == {"runs": (Path("a"),), "deep": False}
    assert parse(Positional, "--deep", "True", "a") == {"runs": (Path("a"),), "deep": True}
    assert parse(Positional, "a", "--deep=false") == {"runs": (Path("a"),), "deep": False}
    assert parse(Positional, "a", "--deep") == {"runs": (Path("a"),), "deep": True}
    assert parse(Positional, "--deep", "--", "a", "--deep", "b") == {
        "runs": (Path("a"), Path("--deep"), Path("b")),
        "deep": True,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out o --n x", "--n must be a number of type int, got 'x'"),
        ("--out o --n 1.5", "--n must be a number of type int, got '1.5'"),
        ("--out o --flip=perhaps", "--flip must be true or false, got 'perhaps'"),
        ("--out o --mode c", "--mode must be one of a, b, got 'c'"),
        ("--out o --times 1 y", "--times must be a number of type float, got 'y'"),
        ("--out o --inner.weight heavy", "--inner.weight must be a number of type float, got 'heavy'"),
        ("--out=", "--out is empty; name a path"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_option_and_the_text(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Options, *words.split())
    assert message in str(error.value)


@given(
    st.one_of(
        st.tuples(st.just(int), st.integers()),
        st.tuples(st.just(float), st.floats(allow_nan=False)),
        st.tuples(st.just(bool), st.booleans()),
        st.tuples(st.just(tuple[int, ...]), st.lists(st.integers(), max_size=5).map(tuple)),
        st.tuples(st.just(str), st.text(st.characters(exclude_characters="\0"))),
    )
)
def test_a_value_spelled_is_read_as_itself(pair: tuple[Any, Any]) -> None:
    kind, value = pair
    assert parse_text("--x", spelled(value), kind) == value


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """Numbers with ranges."""

    n: int = option(1, "how many", at_least=1)
    share: float = option(0.5, "of them", at_least=0, at_most=1)
    scale: float = option(1.0, "of each", above=0)
    limit_s: float = option(1.0, "before the end", above=0, unbounded=True)
    bias: float | None = option(None, "added")
    times: tuple[float, ...] = option((0.5,), "when", at_least=0, at_most=1)
    keep: bool = option(False, "them", at_least=1)

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "--n must be at least 1, got 0"),
        ({"share": -0.5}, "--share must be in [0, 1], got -0.5"),
        ({"share": 1.5}, "--share must be in [0, 1], got 1.5"),
        ({"share": math.nan}, "--share must be in [0, 1] and finite, got nan"),
        ({"scale": 0.0}, "--scale must be above 0, got 0.0"),
        ({"scale": math.inf}, "--scale must be above 0 and finite, got inf"),
        ({"limit_s": math.nan}, "--limit-s must be above 0 and finite, got nan"),
        ({"bias": -math.inf}, "--bias must be a number and finite, got -inf"),
        ({"times": (0.5, 2.0)}, "--times must be in [0, 1], got 2.0"),
    ],
)
def test_a_number_outside_its_range_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Bounded(**values)
    assert str(error.value) == message


@given(st.integers(min_value=1), st.floats(0, 1), st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_number_inside_its_range_is_taken(n: int, share: float, scale: float) -> None:
    Bounded(n=n, share=share, scale=scale, limit_s=math.inf, bias=-scale, times=(0.0, share, 1.0))


def test_help_has_every_option_once_with_its_default() -> None:
    parser = Parser(prog="x")
    add_options(parser, Options)
    text = " ".join(parser.format_help().split())
    for part in ("how many (default 3)", "keep them (default true)", "A topic:", "100 % of it (default 0.5)"):
        assert text.count(part) == 1, part
    assert "hidden" not in text


def test_defaults_are_shown_as_the_object_has_them() -> None:
    parser = Parser(prog="x")
    add_options(parser, Options, defaults=Options(out=Path("o"), n=9, inner=Inner(weight=4)))
    text = parser.format_help()
    assert "how many (default 9)" in text
    assert "(default 4)" in text


def show(config: Options) -> int:
    print(config)
    return 5


def test_a_command_gets_its_options_and_gives_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {"show": Command("show it", f"{__name__}:Options", f"{__name__}:show")}
    assert run_one("prog", "About.", commands, ["show", "--out", "o", "--n", "1"]) == 5
    assert "n=1" in capsys.readouterr().out
    for argv, message in (
        (["shaw"], "prog: error: unknown command shaw; the commands are show; did you mean show?"),
        (["show", "--out", "o", "--m", "1"], "prog show: error: unknown option --m; did you mean --n"),
        (["show", "--out", "o", "more"], "prog show: error: unknown argument more"),
        ([], "are required: COMMAND"),
    ):
        with pytest.raises(SystemExit) as end:
            run_one("prog", "About.", commands, argv)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
