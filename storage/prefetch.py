"""Items made ahead of their consumer by a background thread, in order, in a ring of buffers.

The thread takes a free buffer, announces the plan after this one (so that the disk begins with it), makes this one's
item and hands it over. A buffer is free again when the consumer gives it back, so no more items exist than the ring has
buffers. What the thread raises is raised in the consumer, after the items before it. `close` returns when the thread
has ended; in a child that was forked, where no thread runs, at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
Buffers = TypeVar("Buffers")
Item = TypeVar("Item")

WAIT_S = 1.0


class Prefetcher(Generic[Plan, Buffers, Item]):
    """One thread that makes an item of every plan. Use as a context manager, which ends it."""

    def __init__(
        self,
        plans: Iterable[Plan],
        announce: Callable[[Plan], None],
        make: Callable[[Plan, Buffers], Item],
        *,
        ring: Sequence[Buffers],
        name: str,
    ) -> None:
        """All three are used in the thread, `plans` lazily, so that there may be no end to them."""
        self._plans, self._announce, self._make, self._ring = plans, announce, make, ring
        self._free: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
        for buffers in ring:
            self._free.put(buffers)
        self._ready: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._make_all, name=name, daemon=True)
        self._thread.start()

    def next(self, on_wait: Callable[[float], None] = lambda seconds: None) -> Item | None:
        """The next item, None after the last. `on_wait` gets the seconds so far, about once a second while it waits."""
        start_s = time.perf_counter()
        while True:
            try:
                item = self._ready.get(timeout=WAIT_S)
                break
            except queue.Empty:
                on_wait(time.perf_counter() - start_s)
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, buffers: Buffers) -> None:
        """Let the thread use the buffers of an item again."""
        self._free.put(buffers)

    def close(self) -> None:
        """End the thread, after the item that it is at."""
        self._closing.set()
        self._free.put(self._ring[0])  # whichever: it may be waiting for one
        self._thread.join()

    def __enter__(self) -> Prefetcher[Plan, Buffers, Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_all(self) -> None:
        try:
            plans = iter(self._plans)
            coming = next(plans, None)
            while coming is not None:
                this, coming = coming, next(plans, None)
                buffers = self._free.get()
                if self._closing.is_set():
                    return
                if coming is not None:
                    self._announce(coming)
                self._ready.put(self._make(this, buffers))
            self._ready.put(None)
        except BaseException as error:  # raised again where the item is asked for
            self._ready.put(error)
