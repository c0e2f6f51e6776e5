"""Fixtures shared by all tests; `--quick`, of `make test-quick`, leaves out whatever starts a process."""

from __future__ import annotations

import multiprocessing.process
import os
import platform
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores; also read by the processes they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from storage.base import console, waiting
from tests import examples
from tests.stores import count_places, make_store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="skip a test where it would start a process, Ray or a compiler"
    )


def pytest_configure(config: pytest.Config) -> None:
    """`make test-all` selects the slow tests too, by another expression than that of pyproject.toml."""
    quick, whole = config.getoption("--quick"), config.getoption("markexpr") != "not slow"
    examples.choose("quick" if quick else "all" if whole else "default")


def pytest_collection_finish(session: pytest.Session) -> None:
    """In place of a list of slow files, which somebody would have to keep: the tests that want a process say so."""
    config = session.config
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if config.getoption("--quick") and not starts_workers:
        platform.processor()  # starts a process the first time, on behalf of libraries that ask
        # Fixtures of a whole module start processes too, so nothing puts these back.
        subprocess.Popen.__init__ = _skip  # type: ignore[method-assign, assignment]
        multiprocessing.process.BaseProcess.start = _skip  # type: ignore[method-assign]


def _skip(*_: Any, **__: Any) -> NoReturn:
    pytest.skip("--quick: this test starts a process, which takes longer than the quick run has")


@pytest.fixture(autouse=True)
def _no_interrupt_from_before() -> Iterator[None]:
    """A command that ran in this process notes Ctrl-C and SIGTERM from then on; what a test sends is its own."""
    handlers = {number: signal.getsignal(number) for number in console.INTERRUPTS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    console._interrupted.clear()


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """A complete store: 40 rows, 1 view, latents/tiny-vae (8, 16, 16) and features/tiny-vit (64 tokens of 24)."""
    root = tmp_path / "store"
    make_store(root)
    return root


@pytest.fixture(scope="session")
def shared_tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store made once, with statistics of its features' places, for tests that only read it."""
    root = tmp_path_factory.mktemp("shared") / "store"
    make_store(root)
    count_places(root)
    return root


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a command says while it has nothing to show, however short that is."""
    said: list[str] = []
    monkeypatch.setattr(waiting, "_say", lambda what, over: said.append(what))
    return said


@pytest.fixture
def behind_bars(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bars say behind their numbers, and `DESCRIPTION: n/total` when they end."""
    said: list[str] = []

    def note(bar: Any, text: str = "", refresh: bool = True) -> None:
        said.append(text)

    close = console._AliveBar.close

    def end(bar: Any) -> None:
        if not bar.disable:
            said.append(f"{bar.desc.rstrip(': ')}: {bar.n}/{bar.total}")
        close(bar)

    monkeypatch.setattr(console._AliveBar, "set_postfix_str", note)
    monkeypatch.setattr(console._AliveBar, "close", end)
    return said
