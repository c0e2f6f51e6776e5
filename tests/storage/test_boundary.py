"""What is read from disk becomes a typed object or one line; nothing hangs, nothing reaches the terminal raw."""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import StoreError
from storage.base.shown import OBEYED, shown

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@dataclass(frozen=True)
class Thing:
    """An example."""

    name: str
    rows: tuple[int, int]


@given(st.builds(Thing, st.text(), st.tuples(st.integers(), st.integers())))
def test_what_was_written_is_read(thing: Thing) -> None:
    assert parse_json(Thing, json.dumps(asdict(thing)), "f", "restore it") == thing


@given(JSON.map(json.dumps) | st.binary())
def test_anything_else_is_one_line(raw: str | bytes) -> None:
    with pytest.raises(StoreError) as caught:
        parse_json(Thing, raw, "some/file", "restore it")
    message = str(caught.value)
    assert message.startswith("some/file is damaged (")
    assert message.endswith("; restore it")
    assert "\n" not in message


def test_the_message_names_the_field_and_what_it_held() -> None:
    with pytest.raises(StoreError, match=r"rows\.1: Input should be a valid integer, got 'x'"):
        parse_json(Thing, '{"name": "a", "rows": [0, "x"]}', "f", "restore it")


def test_deep_nesting_is_one_line() -> None:
    with pytest.raises(StoreError, match="damaged"):
        parse_json(Thing, "[" * 1_000_000, "f", "restore it")


@given(st.text())
def test_what_is_shown_has_nothing_that_a_terminal_obeys(text: str) -> None:
    assert not {unicodedata.category(c) for c in shown(text)} & OBEYED


@pytest.mark.parametrize("text", ["kitten", "Größe", "猫", "a b"])
def test_ordinary_names_are_shown_as_they_are(text: str) -> None:
    assert shown(text) == text


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device", "."):
        with pytest.raises(StoreError, match="not a regular file"):
            read_regular(tmp_path / name)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    assert read_regular(tmp_path / "f", 100) == bytes(100)
    with pytest.raises(StoreError, match="more than 99 bytes"):
        read_regular(tmp_path / "f", 99)
