"""A wait is said on a terminal at once, in a log after a while, and not at all when it is short."""

from __future__ import annotations

import io
import threading
import time

import pytest

from storage.base import waiting as module
from storage.base.waiting import WIPE, waiting


class Stream(io.StringIO):
    """A stderr that may be a terminal, and wakes whoever waits for its first words."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal, self.written = is_terminal, threading.Event()

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        n = super().write(text)
        self.written.set()
        return n


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_S", 0.01)
    monkeypatch.setattr(module, "LOG_AFTER_S", 0.01)


def said(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, hidden: bool = False, waits: bool = True) -> str:
    stream = Stream(is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("starting Ray", hidden=hidden):
        if waits:
            assert stream.written.wait(0.2 if hidden else 30) is not hidden
    return stream.getvalue()


@pytest.mark.usefixtures("quick")
def test_a_terminal_shows_seconds_and_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, is_terminal=True)
    assert text.startswith(f"{WIPE}starting Ray … 0 s\r")
    assert text.endswith(WIPE)


@pytest.mark.usefixtures("quick")
def test_a_log_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, is_terminal=False) == "starting Ray …\n"


@pytest.mark.usefixtures("quick")
def test_ranks_but_the_main_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, is_terminal=True, hidden=True) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_short_wait_says_nothing(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(module, "AFTER_S", 30.0)
    monkeypatch.setattr(module, "LOG_AFTER_S", 30.0)
    start_s = time.monotonic()
    assert said(monkeypatch, is_terminal=is_terminal, waits=False) == ""
    assert time.monotonic() - start_s < 25, "the end of a wait waits for nothing"


@pytest.mark.usefixtures("quick")
def test_an_error_passes_and_the_line_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    monkeypatch.setattr("sys.stderr", stream)

    def fails() -> None:
        with waiting("opening the store"):
            assert stream.written.wait(30)
            raise ValueError("no store")

    with pytest.raises(ValueError, match="no store"):
        fails()
    assert stream.getvalue().endswith(WIPE)
