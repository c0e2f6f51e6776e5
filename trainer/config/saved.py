"""A configuration as a run saves it, as YAML and in each checkpoint, and as later code reads it.

YAML is nested mappings of numbers, strings, booleans and lists of them, nothing else; a checkpoint holds dotted names.
Both carry `version`; what has none is of version 1, which carried none at first. What is read is checked against the
annotated types of `schema.py`'s classes, and an unknown name or a wrong type is one line with what was meant.

A run does not change because a setting was added after it was saved. A setting that is absent has the value that its
declaration calls `before`, whatever the class or a preset says today, and stays absent from what the resumed run saves.
So a new setting needs no new version: VERSION is raised when one changes its name or its meaning, and what was saved
under the old one is translated here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storage.base.boundary import read_regular
from storage.base.errors import UserError
from storage.base.options import close_matches
from storage.base.shown import LONGEST, shown
from trainer.config.schema import TrainConfig
from trainer.config.tree import checked, field_type, flatten, leaves, override
from trainer.config.yaml_file import parse_yaml

VERSION = 1
MAX_CONFIG_BYTES = 1 << 20
PLACES = frozenset({"store", "run"})  # where a run is, which is nothing to remember from it
OTHER_CODE = "use the code that saved it, or newer code"


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """A configuration that was read; `absent` are the dotted settings that it was saved without."""

    config: TrainConfig
    absent: frozenset[str]

    def keep(self, config: TrainConfig, given: Collection[str]) -> TrainConfig:
        """`config` with the absent settings as before they existed, but for the ones that were given explicitly."""
        kept = self.absent - PLACES - set(given)
        return override(config, {name: value for name, value, _ in leaves(self.config) if name in kept})


def to_save(config: TrainConfig, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The version, and dotted name → plain value. `earlier` is what the run saved before, if it did.

    What `earlier` lacks and is as before is left out again, or the run would pass for one that was asked for it.
    """
    flat = flatten(config)
    known = flat if earlier is None else earlier
    younger = {name for name, value, item in leaves(config) if name not in known and value == item.metadata["before"]}
    return {"version": VERSION, **{name: value for name, value in flat.items() if name not in younger}}


def to_yaml(config: TrainConfig, earlier: Mapping[str, Any] | None = None) -> str:
    """The same as YAML, nested by topic, in the order of declaration."""
    tree: dict[str, Any] = {}
    for dotted, value in to_save(config, earlier).items():
        topic, _, name = dotted.rpartition(".")
        (tree.setdefault(topic, {}) if topic else tree)[name] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> SavedConfig:
    """Read what `to_yaml` wrote. Raises UserError naming the file, and the version or setting that is not known."""
    try:
        tree = parse_yaml(read_regular(path, MAX_CONFIG_BYTES), f"config {path}")
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist; a run saves its own as RUN/config.yaml") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path} must be a mapping of settings, as a run's config.yaml")
    return parse_config(tree, f"config {path}")


def parse_config(tree: Mapping[str, Any], where: str) -> SavedConfig:
    """Parse nested mappings (dotted keys are taken too); `where` begins the message of a UserError."""
    blank = TrainConfig()
    declared = {name: item for name, _, item in leaves(blank)}
    saved: dict[str, Any] = {}
    for name, value in tree.items():
        topic = isinstance(value, Mapping)
        saved |= {f"{name}.{inner}": v for inner, v in value.items()} if topic else {str(name): value}
    try:
        version = checked(saved.pop("version", 1), int, "version")
        if not 1 <= version <= VERSION:
            raise UserError(f"version {version} is not for this code, which reads up to {VERSION}; {OTHER_CODE}")
        for name in (name for name in saved if name not in declared):
            raise UserError(
                f"unknown setting {shown(name)[:LONGEST]} (correct its name, or {OTHER_CODE})"
                f"{close_matches(name, list(declared))}"
            )
        before = {name: item.metadata["before"] for name, item in declared.items()}
        values = {name: checked(value, field_type(blank, name), name) for name, value in saved.items()}
        return SavedConfig(config=override(blank, before | values), absent=frozenset(declared.keys() - saved.keys()))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
