"""A wait is said on a terminal at once, in a log after a while, not at all when it is short; a bar's clock goes on."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.utils import disp_len

from storage.base import console
from storage.base import waiting as module
from storage.base.console import progress_bar
from storage.base.waiting import WIPE, waited, waiting


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


@settings(max_examples=30, deadline=None)
@given(what=st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=200), columns=st.integers(1, 200))
def test_a_line_fits_the_terminal_and_keeps_its_clock(what: str, columns: int) -> None:
    """A terminal breaks a longer one, and the wipe takes the last part only."""
    line = module._that_fits(what, " … 3 s", columns)
    assert disp_len(line) < max(columns, len(" … 3 s") + 1)
    assert line.endswith(" … 3 s")
    assert line.startswith(what) or disp_len(line) >= columns - 2, "no more is cut than must be"


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


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.usefixtures("quick")
def test_a_log_hears_of_a_long_wait_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.02)
    stream = Stream(False)
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("measuring FID"):
        until(lambda: stream.getvalue().count("\n") == 3)
    assert stream.getvalue().startswith("measuring FID …\nmeasuring FID … 0 s\nmeasuring FID … 0 s\n")


@pytest.mark.usefixtures("quick")
def test_of_waits_in_one_another_the_innermost_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    monkeypatch.setattr(module, "AFTER_S", 0.05)
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("outer"), waiting("inner"):
        assert stream.written.wait(30)
        time.sleep(0.1)
    assert "inner" in stream.getvalue()
    assert "outer" not in stream.getvalue()


def test_each_item_is_waited_for_and_the_wait_is_over_when_it_is_there(waits: list[str]) -> None:
    for i, item in enumerate(waited("reading receipts", iter("abc"))):
        assert (item, module._waits) == ("abc"[i], [])
    assert waits == ["reading receipts"] * 4


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_clock_of_a_bar_that_nothing_moves_goes_on(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(console, "TICK_S", 0.02)
    monkeypatch.setattr(console, "LOG_EVERY_S", 0.02)
    stream = Stream(is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(8, unit="img", done=3) as bar:
        if is_terminal:
            bar.mininterval = 0.02
        bar.set_postfix_str("loading the encoder")
        until(lambda: stream.getvalue().count("loading the encoder") > 3)
        assert bar.last_print_n == 3, "what the rate is made of is as it was"
    n = len(stream.getvalue())
    time.sleep(0.1)
    assert len(stream.getvalue()) == n, "a bar that is over is shown no more"
