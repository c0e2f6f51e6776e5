"""What a command is doing while it has nothing to show: loading libraries, starting Ray, opening a store.

On a terminal one line on stderr after AFTER_S, with the seconds counting up, which is wiped when the wait is over; in a
log one line after LOG_AFTER_S, which stays. A wait that is over sooner says nothing. Cost: a thread that sleeps.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from storage.base.shown import shown

AFTER_S = 0.3
LOG_AFTER_S = 3.0
WIPE = "\r\x1b[K"


@contextmanager
def waiting(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Say `what` (a phrase such as "starting Ray") while the body runs; `hidden` says nothing (ranks but the main)."""
    if hidden:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_say, args=(shown(what), over), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(what: str, over: threading.Event) -> None:
    stream, start_s = sys.stderr, time.monotonic()
    if not stream.isatty():
        if not over.wait(LOG_AFTER_S):
            print(f"{what} …", file=stream, flush=True)
        return
    pause_s, is_shown = AFTER_S, False
    while not over.wait(pause_s):
        # The cursor returns to the line's start, so that whatever else is printed meanwhile writes over it.
        print(f"{WIPE}{what} … {time.monotonic() - start_s:.0f} s\r", end="", file=stream, flush=True)
        pause_s, is_shown = 1.0, True
    if is_shown:
        print(WIPE, end="", file=stream, flush=True)
