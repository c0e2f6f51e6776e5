"""The driver's ledger: which unit, which attempt, what happened. No Ray in here, so that it is tested by itself.

A unit is handed out, and comes back done or with a failed attempt. After `max_attempts` failed attempts it is given up
and the others go on. A unit that has failed once is a *suspect*: whoever encodes it must have nothing else in hand,
since a unit that kills its worker would take the neighbour's attempt with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_ATTEMPTS = 3


@dataclass
class Ledger:
    """Bookkeeping for a fixed set of units. `given_up` maps a unit to what happened at each of its attempts."""

    units: Iterable[int]
    max_attempts: int = MAX_ATTEMPTS
    done: set[int] = field(default_factory=set)
    given_up: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(self.units)
        self._out: set[int] = set()
        self._failures: dict[int, list[str]] = {}
        assert len(set(self._waiting)) == len(self._waiting)

    @property
    def open(self) -> bool:
        """Whether any unit is neither done nor given up."""
        return bool(self._waiting or self._out)

    @property
    def n_out(self) -> int:
        """Units handed out and not back."""
        return len(self._out)

    def take(self) -> int | None:
        """Hand out a unit: fresh ones first, suspects when nothing else is left to hand out; None when none waits."""
        if not self._waiting:
            return None
        unit = self._waiting.popleft()
        self._out.add(unit)
        return unit

    def is_suspect(self, unit: int) -> bool:
        """Whether the unit has failed before."""
        return unit in self._failures

    def finish(self, unit: int) -> None:
        """The unit is published."""
        self._out.remove(unit)
        self.done.add(unit)

    def fail(self, unit: int, what: str) -> None:
        """An attempt failed; the unit goes to the end of the queue, or is given up after the last attempt."""
        self._out.remove(unit)
        history = self._failures.setdefault(unit, [])
        history.append(what)
        if len(history) < self.max_attempts:
            self._waiting.append(unit)
        else:
            self.given_up[unit] = history


def window(n_cpus: int, n_encoders: int, depth: int, object_store_bytes: int, unit_bytes: int) -> int:
    """How many units may be decoding, waiting or encoding at once.

    Enough to keep every core decoding and every encoder supplied, and no more than half of the object store holds, so
    that nothing spills: min(cpus + depth · encoders, store / 2 / unit), at least 1.
    """
    return max(1, min(n_cpus + depth * n_encoders, object_store_bytes // 2 // unit_bytes))
