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
it is positional or `spaced`, several arguments. A bool is `--flip`, `--no-flip`, or `--flip true`; in a class with
positional arguments, for which the value could be meant, the last form does not exist.

What the user gave is read as text and converted here, so that a wrong value is one line that names the option.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from storage.base.errors import UserError

LONGEST = 80  # characters of a value in a message
URL = "://"


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field that `--name` sets. `also` adds spellings, `flag` replaces the spelling, `metavar` names the value.

    The type is Any, as that of `dataclasses.field` is.
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
    parser: argparse.ArgumentParser, config_class: type, *, defaults: object = None, topics: bool = True
) -> None:
    """Add an option for each field, with its help text and default.

    `defaults`, an object of the class, has the defaults to show where these are not those of the class.
    """
    options = list(options_of(config_class, topics=topics))
    bare_switches = any(each.is_positional for each in options)
    groups: dict[str, Any] = {}
    for each in options:
        topic = each.name.rpartition(".")[0]
        if topic and topic not in groups:
            heading = typing.get_type_hints(config_class)[topic].__doc__.splitlines()[0].rstrip(".")
            groups[topic] = parser.add_argument_group(heading)
        _add(groups.get(topic, parser), each, _help(each, defaults), bare_switches)


def _add(parser: Any, each: Option, help_text: str, bare_switches: bool) -> None:
    several = {"nargs": "+"} if each.takes_several else {}
    if each.is_positional:
        if each.field.metadata.get("rest"):
            several = {"nargs": argparse.REMAINDER}
        parser.add_argument(each.name, metavar=each.flag, help=help_text, **several)
        return
    flags = (each.flag, *each.field.metadata.get("also", ()))
    if each.kind is bool:
        value: dict[str, Any] = (
            {"action": "store_const", "const": "true"}
            if bare_switches
            else {"nargs": "?", "const": "true", "metavar": "true|false"}
        )
        parser.add_argument(*flags, dest=each.name, default=None, help=help_text, **value)
        negation = f"--no-{each.flag.removeprefix('--')}"
        parser.add_argument(negation, dest=each.name, action="store_const", const="false", help=argparse.SUPPRESS)
        return
    metavar = each.field.metadata.get("metavar", _metavar(each.kind, several=bool(several)))
    parser.add_argument(
        *flags, dest=each.name, metavar=metavar, default=None, required=each.is_required, help=help_text, **several
    )


def _help(each: Option, defaults: object) -> str:
    value: Any = each.field.default
    if defaults is not None:
        value = defaults
        for part in each.name.split("."):
            value = getattr(value, part)
    text = str(each.field.metadata["help"])
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


def parse_text(flag: str, text: str, kind: Any) -> Any:
    """An option's text as the type of its field. Raises UserError that names the option and the text."""
    if typing.get_origin(kind) is tuple:
        return tuple(parse_text(flag, part, typing.get_args(kind)[0]) for part in (text.split(",") if text else []))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag} must be true or false, got {text[:LONGEST]!r}")
        return text.lower() == "true"
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
        return Path(text)
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
