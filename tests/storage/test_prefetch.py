"""Items that a thread makes ahead: in order, no more than the ring holds, errors in their place, an end at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing import get_context
from typing import Any

import pytest

from storage.prefetch import Prefetcher

NAME = "prefetch-test"


def running() -> bool:
    return NAME in [thread.name for thread in threading.enumerate()]


def ahead(plans: Any, made: list[int], *, ring: int = 3, announced: list[int] | None = None) -> Prefetcher:
    """Items are (plan, buffer)."""

    def make(plan: int, buffer: int) -> tuple[int, int]:
        made.append(plan)
        return plan, buffer

    announce = (lambda plan: None) if announced is None else announced.append
    return Prefetcher(plans, announce, make, ring=range(ring), name=NAME)


def until(condition: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert condition()


def test_items_come_in_order_and_each_plan_is_announced_once_before_its_item() -> None:
    made: list[int] = []
    announced: list[int] = []
    seen = []
    with ahead(range(20), made, announced=announced) as items:
        while (item := items.next()) is not None:
            seen.append(item[0])
            items.give_back(item[1])
    assert seen == made == list(range(20))
    assert announced == list(range(1, 20))  # nobody waits for the disk longer than for the first


def test_no_more_items_are_made_than_buffers_are_free() -> None:
    made: list[int] = []
    with ahead(count(), made, ring=3) as items:
        until(lambda: len(made) == 3)
        first, second = items.next(), items.next()
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert {first[1], second[1]} == {0, 1}  # type: ignore[index]
        items.give_back(1)
        until(lambda: len(made) == 4)
        assert items.next() == (2, 2)
        assert items.next() == (3, 1)


def test_an_error_comes_after_the_items_before_it() -> None:
    def plans() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    made: list[int] = []
    with ahead(plans(), made) as items:
        assert [items.next()[0] for _ in range(2)] == [0, 1]  # type: ignore[index]
        with pytest.raises(OSError, match="no more"):
            items.next()
    assert not running()


def test_closing_wakes_a_thread_that_waits_for_a_buffer() -> None:
    made: list[int] = []
    items = ahead(count(), made)
    until(lambda: len(made) == 3)
    items.close()
    assert not running()
    assert len(made) == 3


def test_an_interrupt_ends_the_wait_and_the_thread() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))

    def make(plan: int, buffer: int) -> int:
        timer.start()
        timer.join()
        time.sleep(0.3)  # longer than the consumer needs to leave
        return plan

    with pytest.raises(KeyboardInterrupt), Prefetcher(range(3), print, make, ring=[0], name=NAME) as items:
        items.next()
    assert not running()


def _close_in_child(items: Prefetcher, pipe: Any) -> None:
    items.close()
    pipe.send("closed")


def test_a_forked_child_closes_at_once() -> None:
    made: list[int] = []
    with ahead(count(), made) as items:
        until(lambda: len(made) == 3)
        ours, theirs = get_context("fork").Pipe()
        child = get_context("fork").Process(target=_close_in_child, args=(items, theirs))
        child.start()
        try:
            assert ours.poll(30), "closing waits for a thread that does not run"
        finally:
            child.kill()
            child.join()
