"""The command line of a training run: one dotted option a field of `TrainConfig`, made from the dataclasses.

defaults of --preset, or the whole of --config RUN/config.yaml;  then what is given explicitly
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from storage.base.console import Parser
from storage.base.errors import UserError
from storage.roots import absolute
from trainer.config.presets import DEFAULT_PRESET, PRESET_NAMES, PRESETS, preset
from trainer.config.schema import TrainConfig, spelled
from trainer.config.tree import checked, close_matches, field_type, from_yaml, leaves, override


def add_train_options(parser: Parser, argv: Sequence[str] = ()) -> None:
    """Every option of a run, with help text and the defaults of the preset that `argv` names."""
    parser.add_argument("--config", type=Path, help="run again what RUN/config.yaml says")
    named = dict(itertools.pairwise(argv)).get("--preset", DEFAULT_PRESET)
    shown = preset(named if named in PRESETS else DEFAULT_PRESET)
    sections = {
        item.name: parser.add_argument_group(_first_line(getattr(shown, item.name)))
        for item in dataclasses.fields(shown)
        if dataclasses.is_dataclass(getattr(shown, item.name))
    }
    for name, default, item in leaves(shown):
        kind = field_type(shown, name)
        help_text = item.metadata["help"]
        if name == "preset":
            help_text = f"{help_text}: {PRESET_NAMES} (default {DEFAULT_PRESET})"
        elif spelled(default) not in ("", "."):
            help_text += f" (default {spelled(default)})"
        sections.get(name.partition(".")[0], parser).add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar=_metavar(kind), default=None, help=help_text
        )


def _first_line(config: object) -> str:
    assert config.__doc__ is not None, config
    return config.__doc__.splitlines()[0].rstrip(".")


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(typing.get_args(kind))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{_metavar(typing.get_args(kind)[0])}[,…]"
    return kind.__name__.upper()


def train_config(values: dict[str, Any]) -> TrainConfig:
    """The configuration from parsed options. Raises UserError, naming option and value."""
    given = {name: value for name, value in values.items() if value is not None}
    if values.get("config") is not None:
        config = from_yaml(given.pop("config"))
        if "preset" in given:
            raise UserError("--config and --preset both name a whole configuration; pass one of them")
    else:
        config = preset(given.pop("preset", DEFAULT_PRESET))
    return override(config, {name: parse_option(name, text, field_type(config, name)) for name, text in given.items()})


def refuse_unknown(parser: Parser, unknown: Sequence[str]) -> None:
    """End with one line that names the first unknown option and its nearest neighbours."""
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{close_matches(unknown[0].partition('=')[0], known)}")


def parse_option(name: str, text: str, kind: Any) -> Any:
    """An option's text as its field's type. Raises UserError."""
    if typing.get_origin(kind) is tuple:
        return tuple(parse_option(name, part, typing.get_args(kind)[0]) for part in (text.split(",") if text else []))
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{flag} must be a number of type {kind.__name__}, got {text!r}") from None
    value = checked(text, kind, flag)
    # Absolute, since a resume may come from another directory.
    if name == "store" and value:
        return absolute(value)
    return value.absolute() if isinstance(value, Path) else value
