"""Every number that a command takes has a range, and one outside it is one line: the option, the range, the value."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import pytest

from pipeline import commands as of_pipeline
from storage import commands as of_storage
from storage.base.commands import imported
from storage.base.errors import UserError
from storage.base.options import Option, options_of
from trainer import commands as of_trainer

FITTING = {"codec": "int8", "to": "hdf5", "format": "hdf5"}  # of options that name one of several things


def number_options() -> dict[str, tuple[type, Option]]:
    """Command and option → the class, the option; but for settings of a run, which `trainer/test_config.py` has."""
    options = {}
    for commands in (of_storage, of_pipeline, of_trainer):
        for name, command in commands.COMMANDS.items():
            config_class = imported(command.options)
            if not hasattr(config_class, "add_options"):
                for each in options_of(config_class):
                    if _number_type(each) is not None:
                        options[f"{commands.__name__.partition('.')[0]} {name} {each.flag}"] = config_class, each
    return options


def _number_type(each: Option) -> type | None:
    kind = typing.get_args(each.kind)[0] if typing.get_origin(each.kind) is tuple else each.kind
    return kind if kind in (int, float) else None


OPTIONS = number_options()


def made(config_class: type, each: Option, number: float) -> Any:
    """An object with this number, and with something in every field that has no default, or has to name something."""
    values = {
        other.name: FITTING.get(other.name, (Path("x"),) if typing.get_origin(other.kind) is tuple else "x")
        for other in options_of(config_class)
        if other.is_required or other.name in FITTING
    }
    return config_class(**{**values, each.name: (number,) if typing.get_origin(each.kind) is tuple else number})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_number_outside_its_range_is_refused(name: str) -> None:
    config_class, each = OPTIONS[name]
    kind = _number_type(each)
    assert kind is not None
    for number in (kind(-1), *([math.nan] if kind is float else [])):
        with pytest.raises(UserError) as error:
            made(config_class, each, number)
        message = str(error.value)
        assert message.startswith(f"{each.flag} must be "), message
        assert message.endswith(f", got {number}"), message


def test_the_defaults_are_inside(tmp_path: Path) -> None:
    assert len(OPTIONS) > 30
    for config_class, each in OPTIONS.values():
        default = each.field.default
        if isinstance(default, int | float):
            assert getattr(made(config_class, each, default), each.name) == default
