"""The options of a command, made from a dataclass: a field is an option, with its type, help text and default.

    @dataclass(frozen=True, kw_only=True)
    class PreviewConfig:
        store: str = argument("store whose groups are drawn")      # positional
        out: Path = required("folder for the pictures")            # --out PATH, which must be given
        images: int = option(8, "how many images to show")         # --images 8

    add_options(parser, PreviewConfig)
    config = PreviewConfig(**given_options(PreviewConfig, vars(parser.parse_args())))

A nested dataclass is a topic: its fields become `--topic.name`, under a heading that is the first line of its
docstring. A field without a help text is no option. Types are str, int, float, bool, Path, `Path | str` (a path or a
URL), a Literal of strings, any of these or None, and a tuple of one of them. A tuple is one text with commas, or, where
it is positional or `spaced`, several arguments. A bool is `--flip`, `--no-flip`, or `--flip true`; beside positional
arguments a word after `--flip` that is neither true nor false is one of those.

What the user gave is read as text and converted here, so that a wrong value is one line that names the option.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from storage.base.errors import UserError
from storage.base.programs import as_called
from storage.base.shown import LONGEST

URL = "://"
TRUE, FALSE = "true", "false"
BOUNDS = {"at_least": -math.inf, "above": -math.inf, "at_most": math.inf}


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field that `--name` sets. `also` adds spellings, `flag` replaces the spelling, `metavar` names the value.

    `at_least`, `above` and `at_most` bound its numbers, and `check_ranges` refuses others, infinity too unless it is
    `unbounded`. `often` is for a class of many options: a short help shows those alone. The type is Any, as that of
    `dataclasses.field` is.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def required(help_text: str, **metadata: Any) -> Any:
    """A field that `--name` sets and that has no default."""
    return dataclasses.field(metadata={"help": help_text, **metadata})


def argument(help_text: str, **metadata: Any) -> Any:
    """A field that a positional argument sets; `rest` takes the whole rest of the command line, options included."""
    return dataclasses.field(metadata={"help": help_text, "positional": True, **metadata})


@dataclass(frozen=True)
class Option:
    """A field as an option: its dotted name, its type without None, its declaration."""

    name: str
    kind: Any
    field: dataclasses.Field[Any]

    @property
    def flag(self) -> str:
        """The command line's spelling, `--loss.projection-weight`; of a positional argument its name in capitals."""
        if self.is_positional:
            return str(self.field.metadata.get("metavar", self.name.upper()))
        return str(self.field.metadata.get("flag", flag_of(self.name)))

    @property
    def is_positional(self) -> bool:
        """Whether the place on the command line names the field."""
        return bool(self.field.metadata.get("positional"))

    @property
    def is_required(self) -> bool:
        """Whether the command line must name a value."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def takes_several(self) -> bool:
        """Whether the values of a tuple are arguments of their own."""
        return typing.get_origin(self.kind) is tuple and (self.is_positional or bool(self.field.metadata.get("spaced")))


def flag_of(dotted: str) -> str:
    """The command line's spelling of a field: `--loss.projection-weight` of `loss.projection_weight`."""
    return f"--{dotted.replace('_', '-')}"


def options_of(config_class: type, topic: str = "", *, topics: bool = True) -> Iterator[Option]:
    """Every option of a dataclass, and, if `topics`, those of nested ones after it, in the order of declaration."""
    kinds = typing.get_type_hints(config_class)
    nested = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(kinds[field.name]):
            nested.append(field.name)
        elif "help" in field.metadata:
            yield Option(f"{topic}{field.name}", _without_none(kinds[field.name]), field)
    for name in nested if topics else ():
        yield from options_of(kinds[name], f"{topic}{name}.")


def add_options(
    parser: argparse.ArgumentParser,
    config_class: type,
    *,
    defaults: object = None,
    topics: bool = True,
    short: bool = False,
) -> None:
    """Add an option for each field, with its help text and default.

    `defaults`, an object of the class, has the defaults to show where these are not those of the class. `short` keeps
    all but the options that are declared `often` out of the help, one list then; they are options all the same.
    """
    groups: dict[str, Any] = {}
    for each in options_of(config_class, topics=topics):
        topic = "" if short else each.name.rpartition(".")[0]
        if topic and topic not in groups:
            heading = typing.get_type_hints(config_class)[topic].__doc__.splitlines()[0].rstrip(".")
            groups[topic] = parser.add_argument_group(heading)
        is_shown = not short or each.field.metadata.get("often")
        _add(groups.get(topic, parser), each, _help(each, defaults) if is_shown else argparse.SUPPRESS)


def _add(parser: Any, each: Option, help_text: str) -> None:
    several = {"nargs": "+"} if each.takes_several else {}
    if each.is_positional:
        if each.field.metadata.get("rest"):
            several = {"nargs": argparse.REMAINDER}
        parser.add_argument(each.name, metavar=each.flag, help=help_text, **several)
        return
    flags = (each.flag, *each.field.metadata.get("also", ()))
    if each.kind is bool:
        value = {"nargs": "?", "const": TRUE, "metavar": "true|false"}
        parser.add_argument(*flags, dest=each.name, default=None, help=help_text, **value)
        negation = f"--no-{each.flag.removeprefix('--')}"
        parser.add_argument(negation, dest=each.name, action="store_const", const=FALSE, help=argparse.SUPPRESS)
        return
    metavar = each.field.metadata.get("metavar", _metavar(each.kind, several=bool(several)))
    parser.add_argument(
        *flags, dest=each.name, metavar=metavar, default=None, required=each.is_required, help=help_text, **several
    )


def values_joined(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--flip` as `--flip=true` where a positional argument follows.

    `argparse` would take that argument, whatever it is, for the value of `--flip`.
    """
    switches = {
        flag for each in parser._actions if each.nargs == "?" and each.const == TRUE for flag in each.option_strings
    }
    if all(each.option_strings for each in parser._actions):  # no positional arguments: the word is a wrong value
        return list(words)
    n_options = list(words).index("--") if "--" in words else len(words)
    joined = list(words)
    for i, word in enumerate(words[: n_options - 1] if n_options else ()):
        following = words[i + 1]
        if word in switches and not following.startswith("-") and following.lower() not in (TRUE, FALSE):
            joined[i] = f"{word}={TRUE}"
    return joined


def _help(each: Option, defaults: object) -> str:
    value: Any = each.field.default
    if defaults is not None:
        value = defaults
        for part in each.name.split("."):
            value = getattr(value, part)
    text = as_called(str(each.field.metadata["help"]))
    if not each.is_required and "(default" not in text and value not in (None, "", (), Path()):
        text += f" (default {' '.join(map(spelled, value)) if each.takes_several else spelled(value)})"
    return text.replace("%", "%%")


def given_options(config_class: type, texts: Mapping[str, Any], *, topics: bool = True) -> dict[str, Any]:
    """Dotted name → value, of the fields of the class that the command line names.

    `texts` is what `argparse` made: a text, several, or None for an option that is not there. Raises UserError.
    """
    return {
        each.name: _value(each, texts[each.name])
        for each in options_of(config_class, topics=topics)
        if texts.get(each.name) is not None
    }


def _value(each: Option, text: Any) -> Any:
    if isinstance(text, list):
        if "" in text and typing.get_args(each.kind)[0] is Path:
            raise UserError(f"one of {each.flag} is empty; name paths")
        return tuple(parse_text(each.flag, part, typing.get_args(each.kind)[0]) for part in text)
    if text == "" and each.is_required and each.kind is not str:
        raise UserError(f"{each.flag} is empty; name a path (make takes it as {each.flag.strip('-').upper()}=…)")
    return parse_text(each.flag, text, each.kind)


def as_words(config: Any) -> list[str]:
    """The words of a command line that make this object: what differs from its class's defaults, as it is spelled."""
    words: list[str] = []
    arguments: list[str] = []
    for each in options_of(type(config), topics=False):
        value = getattr(config, each.name)
        if value is None or (not each.is_required and value == each.field.default):
            continue
        texts = [spelled(part) for part in value] if each.takes_several else [spelled(value)]
        if each.is_positional:
            arguments += texts
        elif each.kind is bool:
            words.append(each.flag if value else f"--no-{each.flag.removeprefix('--')}")
        elif len(texts) == 1 and texts[0].startswith("-"):
            words.append(f"{each.flag}={texts[0]}")
        else:
            words += [each.flag, *texts]
    return [*arguments, *words]


def check_ranges(config: object) -> None:
    """Raise UserError for the first number that lies outside the range that its field declares, or is not finite.

    For a dataclass's `__post_init__`; nested ones check themselves. None is no number.
    """
    for each in options_of(type(config), topics=False):
        value = getattr(config, each.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_range(each, number)


def _check_range(each: Option, number: float) -> None:
    bounds = each.field.metadata
    least, above, most = (bounds.get(name, default) for name, default in BOUNDS.items())
    fits = least <= number <= most and number > above  # NaN does not
    if not fits or (math.isinf(number) and not bounds.get("unbounded")):
        if "at_least" in bounds and "at_most" in bounds:
            rule = f"in [{least}, {most}]"
        else:
            rule = next((f"{name.replace('_', ' ')} {bounds[name]}" for name in BOUNDS if name in bounds), "a number")
        rule += " and finite" if isinstance(number, float) and not math.isfinite(number) else ""
        raise UserError(f"{each.flag} must be {rule}, got {number}")


def parse_text(flag: str, text: str, kind: Any) -> Any:
    """An option's text as the type of its field. Raises UserError that names the option and the text."""
    if typing.get_origin(kind) is tuple:
        return tuple(parse_text(flag, part, typing.get_args(kind)[0]) for part in (text.split(",") if text else []))
    if kind is bool:
        if text.lower() not in (TRUE, FALSE):
            raise UserError(f"{flag} must be true or false, got {text[:LONGEST]!r}")
        return text.lower() == TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{flag} must be a number of type {kind.__name__}, got {text[:LONGEST]!r}") from None
    if "\0" in text:
        raise UserError(f"{flag} must not hold a null character, got {text[:LONGEST]!r}")
    if typing.get_origin(kind) is Literal:
        one_of(flag, text, typing.get_args(kind))
        return text
    if kind is Path or (_is_union(kind) and URL not in text):
        path = Path(text)  # a folder's name goes into names of files beside it, which `.` and `..` do not have
        return Path(os.path.abspath(path)) if text and path.name in ("", "..") else path
    return text


def one_of(flag: str, text: str, choices: Iterable[str]) -> None:
    """Raise UserError where an option's text is none of the choices."""
    if text not in choices:
        raise UserError(f"{flag} must be one of {', '.join(choices)}, got {text[:LONGEST]!r}")


def spelled(value: Any) -> str:
    """A value as the command line takes it: a tuple as its values between commas."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(spelled, value)) if isinstance(value, tuple) else str(value)


def _metavar(kind: Any, several: bool = False) -> str:
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(typing.get_args(kind))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{_metavar(typing.get_args(kind)[0])}{'' if several else '[,…]'}"
    return "PATH|URL" if _is_union(kind) else str(kind.__name__).upper()


def _without_none(kind: Any) -> Any:
    """`T` of `T | None`; any other type as it is."""
    if not _is_union(kind):
        return kind
    kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007 — of a list


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def close_matches(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?` for the names nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
