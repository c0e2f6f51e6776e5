"""Axes of charts: where they begin and end, so that a small difference looks small, and the numbers along them.

An axis begins at zero unless all values are far from it; then it covers at least a quarter of the largest value, so
that a difference of 1 % is at most 4 % of the chart's height. Positive values that span a factor of LOG_FROM or more
are drawn on a logarithmic axis where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TICKS = 5
FROM_ZERO = 0.6  # a smallest value below this share of the largest is shown from zero
LEAST_SHARE = 0.25  # of the largest value, that an axis away from zero covers
MARGIN = 0.05
LOG_FROM = 30.0
TINY = 1e-90  # differences below it are none; their logarithms would overflow


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Ends, never equal; `log` is decimal."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def begins_at_zero(self) -> bool:
        """Whether lengths on it compare as the values do."""
        return not self.log and self.low <= 0 <= self.high

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Round numbers inside; `whole` for what is counted."""
        if not self.log:
            return ticks(self.low, self.high, whole=whole)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if self.high / self.low < 1000 else (1,)
        every = math.ceil(len(decades) / (2 * TICKS))
        round_numbers = [10.0**decade * factor for decade in decades[::every] for factor in factors]
        return [value for value in round_numbers if self.low <= value <= self.high]


def axis_of(values: Iterable[float], *, log: bool = False, zero: bool = False) -> Axis:
    """The axis for values, at least one; `log` allows a logarithmic one, `zero` makes it begin at or cross zero."""
    values = list(values)
    low, high = min(values), max(values)
    if log and not zero and low > TINY and high / low >= LOG_FROM:
        return Axis(low=low / 1.1, high=high * 1.1, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    size, span = max(abs(low), abs(high)), high - low
    if span <= size * 1e-9 + TINY:
        around = max(size, 1.0) / 2
        return Axis(low=0.0, high=high + around) if low >= 0 else Axis(low=low - around, high=high + around)
    margin = span * MARGIN
    if 0 <= low <= FROM_ZERO * high:
        return Axis(low=0.0, high=high + margin)
    if 0 <= -high <= FROM_ZERO * -low:
        return Axis(low=low - margin, high=0.0)
    margin = max(margin, (LEAST_SHARE * size - span) / 2)
    return Axis(low=low - margin, high=high + margin)


def counted_axis(values: Sequence[float], *, from_zero: bool = True) -> Axis:
    """The axis of what is counted along x, from the first to the last; without `from_zero`, with room at either end."""
    low, high = min(values), max(values)
    if not from_zero:
        room = max(0.04 * (high - low), 0.1)
        return Axis(low=low - room, high=high + room)
    if low <= FROM_ZERO * high:
        return Axis(low=0.0, high=high) if high > 0 else Axis(low=0.0, high=1.0)
    return Axis(low=low, high=high) if high > low else Axis(low=low - 1, high=high + 1)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """At most TICKS + 1 round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= TICKS)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 250, 400K, 1.5M, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if size <= abs(value) < 1e13:
            return f"{value / (1e3 if letter == 'K' else size):g}{letter}"
    return f"{round(value, 10):g}"
