"""A few threads that a caller works with, not waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Work = TypeVar("Work")


class Threads:
    """`n` threads at most, the caller's among them; none is started before there is work for it."""

    def __init__(self, n: int, name: str) -> None:
        self.n = n
        self._pool = ThreadPoolExecutor(n, thread_name_prefix=name)

    def share(self, work: Callable[[Work], None], pieces: Sequence[Work]) -> None:
        """Do the pieces, here and on the pool, each thread taking the next one that is left.

        Returns when nobody works on any, and raises the first error. The caller does not wait for a thread to wake up.
        """
        left = iter(pieces)  # taking the next item of a list's iterator is atomic

        def take() -> None:
            for piece in left:
                work(piece)

        futures = [self._pool.submit(take) for _ in range(min(self.n, len(pieces)) - 1)]
        try:
            take()
        finally:
            for future in futures:  # nobody may write into the caller's memory once we return
                if not future.cancel():
                    future.exception()
        for future in futures:
            if not future.cancelled():
                future.result()

    def close(self) -> None:
        """Wait for the threads to end."""
        self._pool.shutdown(wait=True)
