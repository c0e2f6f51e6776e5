"""What a command is doing while it has nothing to show: loading libraries, starting Ray, opening a store.

On a terminal one line on stderr after AFTER_S, with the seconds counting up, which is wiped when the wait is over; in a
log one line after LOG_AFTER_S, which stays, and another every LOG_EVERY_S. A wait that is over sooner says nothing. Of
waits in one another the innermost speaks. A bar needs none of this: its clock goes on, and what it waits for stands
behind it (`bar.set_postfix_str`). Cost: a thread that sleeps.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm.utils import disp_len, disp_trim

from storage.base.shown import shown

Item = TypeVar("Item")
AFTER_S = 0.3
LOG_AFTER_S = 3.0
LOG_EVERY_S = 10.0  # as often as a bar
WIPE = "\r\x1b[K"


@contextmanager
def waiting(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Say `what` (a phrase such as "starting Ray") while the body runs; `hidden` says nothing (ranks but the main)."""
    if hidden:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_say, args=(shown(what), over), name="waiting", daemon=True)
    _waits.append(over)
    thread.start()
    try:
        yield
    finally:
        over.set()
        _waits.remove(over)
        thread.join()


def waited(what: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, saying `what` while each is awaited."""
    iterator = iter(items)
    while True:
        with waiting(what):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]  # no other object is the end


_END = object()
_waits: list[threading.Event] = []  # those at hand, the innermost last


def _columns(stream: TextIO) -> int:
    """The width of a stream's own terminal: stdout may be a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def _that_fits(what: str, clock: str, columns: int) -> str:
    """One line of the terminal, with a column left for the cursor: of a line that is broken, only the last is wiped."""
    room = columns - 1 - len(clock)
    return what + clock if disp_len(what) <= room else disp_trim(what, max(0, room)) + clock


def _say(what: str, over: threading.Event) -> None:
    stream, start_s = sys.stderr, time.monotonic()
    if not stream.isatty():
        pause_s = LOG_AFTER_S
        while not over.wait(pause_s):
            if _waits[-1:] == [over]:
                seconds = f" {time.monotonic() - start_s:.0f} s" if pause_s != LOG_AFTER_S else ""
                print(f"{what} …{seconds}", file=stream, flush=True)
            pause_s = LOG_EVERY_S
        return
    pause_s, is_shown = AFTER_S, False
    while not over.wait(pause_s):
        if _waits[-1:] == [over]:
            line = _that_fits(what, f" … {time.monotonic() - start_s:.0f} s", _columns(stream))
            # The cursor returns to the line's start, so that whatever else is printed meanwhile writes over it.
            print(f"{WIPE}{line}\r", end="", file=stream, flush=True)
            is_shown = True
        pause_s = 1.0
    if is_shown:
        print(WIPE, end="", file=stream, flush=True)
