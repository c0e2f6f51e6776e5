"""The command line of a training run: one dotted option a field of `TrainConfig`, made from the dataclasses.

defaults of --preset, or the whole of --config RUN/config.yaml;  then what is given explicitly
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from storage.base.console import Parser
from storage.base.errors import UserError
from storage.base.options import (
    add_options,
    argument,
    flag_of,
    given_options,
    option,
    options_of,
    parse_text,
    required,
)
from storage.roots import absolute
from trainer.config.presets import PRESETS, preset
from trainer.config.saved import read_config
from trainer.config.schema import DEFAULT_PRESET, TrainConfig
from trainer.config.tree import field_type, override
from trainer.run.published import Release

HELP_ALL = "--help-all"


@dataclass(frozen=True, kw_only=True)
class _WithSettings:
    """A command that has every setting of a run among its options."""

    settings: Mapping[str, Any]  # the texts of --config and of the settings, by dotted name; None: not spelled

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
        """Add the options of the command's own, and every setting."""
        add_options(parser, cls, topics=False)
        needed = [each for each in options_of(cls, topics=False) if each.is_required]
        add_train_options(parser, argv)
        if HELP_ALL not in argv:
            words = (each.flag if each.is_positional else f"{each.flag} {each.name.upper()}" for each in needed)
            parser.usage = " ".join(["%(prog)s", *words, "[option …]"])

    @classmethod
    def from_options(cls, texts: Mapping[str, Any]) -> Self:
        """The command of what `argparse` made. Raises UserError."""
        return cls(**given_options(cls, texts, topics=False), settings=texts)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(_WithSettings):
    """`train`: a configuration, and whether an existing run may be continued with another one."""

    resume_with_changes: bool = option(False, "resume the run although settings that determine it changed")
    json: bool = option(False, "end with the summary as JSON, as RUN/summary.json has it")

    @property
    def given(self) -> frozenset[str]:
        """Dotted names of the settings that the command line spells."""
        return frozenset(_given(self.settings))


@dataclass(frozen=True, kw_only=True)
class ImportCommand(_WithSettings):
    """`import`: a public checkpoint, and settings of the run that it becomes."""

    file: Path = argument("what torch.save or safetensors wrote")
    release: Release = required("whose it is; without --preset, the preset is the one that its shapes fit")


def add_train_options(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """Every setting of a run, with help text and the defaults of the preset that `argv` names; and --config.

    `--help` shows the settings that most runs set, `--help-all` the whole.
    """
    short = HELP_ALL not in argv
    n_settings = sum(1 for _ in options_of(TrainConfig))
    parser.add_argument(HELP_ALL, action="help", help=f"help on all {n_settings} settings and exit")
    parser.add_argument("--config", metavar="PATH", help="run again what RUN/config.yaml says")
    add_options(parser, TrainConfig, defaults=preset(_preset_in(argv)), short=short)


def _preset_in(argv: Sequence[str]) -> str:
    """The preset that the words name, if there is one of that name."""
    parser = Parser(add_help=False)
    parser.add_argument("--preset", nargs="?")
    named = parser.parse_known_args(argv)[0].preset
    return named if named in PRESETS else DEFAULT_PRESET


def train_config(texts: Mapping[str, Any], *, base: TrainConfig | None = None) -> TrainConfig:
    """The configuration of dotted name → text; `base` stands for a preset. Raises UserError that names both."""
    given = _given(texts)
    if base is not None:
        given.pop("preset", None)
        config = base
    elif texts.get("config") is not None:
        config = read_config(Path(texts["config"])).config
        if "preset" in given:
            raise UserError("--config and --preset both name a whole configuration; pass one of them")
    else:
        config = preset(given.pop("preset", DEFAULT_PRESET))
    return override(config, {name: parse_setting(name, text, field_type(config, name)) for name, text in given.items()})


def _given(texts: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name → text of the settings among parsed options."""
    return {each.name: texts[each.name] for each in options_of(TrainConfig) if texts.get(each.name) is not None}


def parse_setting(name: str, text: str, kind: Any) -> Any:
    """A setting's text as its type; paths become absolute, since a resume may come from another directory."""
    value = parse_text(flag_of(name), text, kind)
    if name == "store" and value:
        return absolute(value)
    return value.absolute() if isinstance(value, Path) else value
