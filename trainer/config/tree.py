"""A config as a tree of settings: read and replaced by dotted name, as plain values and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from storage.base.errors import UserError
from storage.base.options import close_matches
from storage.base.shown import LONGEST

C = TypeVar("C")
LARGEST = 2**63  # seeds go up to it


def leaves(config: Any, topic: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted name, value, field) of every option, nested ones after their parent's, in the order of declaration."""
    fields = dataclasses.fields(config)
    for item in [item for item in fields if not dataclasses.is_dataclass(getattr(config, item.name))]:
        yield f"{topic}{item.name}", getattr(config, item.name), item
    for item in fields:
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{topic}{item.name}.")


def field_type(config: Any, dotted: str) -> Any:
    """The annotated type of a dotted field, e.g. float or Literal["linear", "cosine"]."""
    *topics, name = dotted.split(".")
    for topic in topics:
        config = getattr(config, topic)
    return typing.get_type_hints(type(config))[name]


def override(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with dotted fields replaced, each class checking itself again. Raises UserError for an unknown field."""
    known = {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        if head not in known or bool(rest) != dataclasses.is_dataclass(getattr(config, head)):
            raise UserError(f"unknown setting {dotted}{close_matches(head, known)}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    for head, inner in nested.items():
        direct[head] = override(getattr(config, head), inner)
    return dataclasses.replace(config, **direct)  # type: ignore[type-var]


def flatten(config: Any) -> dict[str, Any]:
    """Dotted name → plain value, as compared on resume and saved in a checkpoint; a tuple of one is its value, and
    a path that nobody gave is empty."""
    return {name: _plain(value) for name, value, _ in leaves(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    if isinstance(value, Path):
        return "" if value == Path() else str(value)
    return value


def free_fields(config: Any) -> set[str]:
    """Dotted names of the fields that may change on resume."""
    return {name for name, _, item in leaves(config) if item.metadata["free"]}


def checked(value: Any, kind: Any, name: str) -> Any:
    """`value` as the annotated type `kind`, or UserError.

    Kinds are int, float, bool, str, Path, a Literal of strings, and a tuple of any length of one of them, for which a
    list or a single value is taken.
    """
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(checked(item, element, name) for item in (value if isinstance(value, list) else [value]))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{name} must be one of {', '.join(typing.get_args(kind))}, got {repr(value)[:LONGEST]}")
        return value
    assert not isinstance(kind, types.UnionType), f"{name}: {kind} has no spelling on the command line"
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} must not hold a null character, got {repr(value)[:LONGEST]}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as a string
        with_number = _number(value)
        if with_number is not None:
            return with_number
    if type(value) is not kind:
        raise UserError(f"{name} must be of type {kind.__name__}, got {repr(value)[:LONGEST]}")
    if kind is int and abs(value) > LARGEST:
        raise UserError(f"{name} must lie within ±2^63, got {repr(value)[:LONGEST]}")
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
