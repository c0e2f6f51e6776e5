"""Whether two methods differ by more than their seeds do: means, spreads, and an interval for the difference.

Values of one method are taken as draws of a normal distribution whose deviation s is the same for all methods, so that
s is pooled over them: s² = Σ (n_g − 1) s_g² / Σ (n_g − 1), with ν = Σ (n_g − 1) degrees of freedom. The difference of
two means then has Student's interval d ± t_ν s √(1/n_a + 1/n_b) (Student, Biometrika 1908). Where the best of k methods
is compared with each other one, the level is shared out among the k − 1 comparisons (Bonferroni), so that all of them
hold together. With one seed a method, s is not known and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two means: `value`, its interval and the seeds' deviation; the last two None where no method has two seeds."""

    value: float
    interval: tuple[float, float] | None
    spread: float | None

    @property
    def reach(self) -> float | None:
        """How large a difference seeds alone could make: half the interval's width."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def is_settled(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def is_within(self) -> bool:
        """Whether the difference is no larger than the seeds' deviation."""
        return self.spread is not None and abs(self.value) <= self.spread


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n − 1; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Deviation within groups, and its degrees of freedom; None where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    squares = math.fsum((deviation(group) or 0.0) ** 2 * (len(group) - 1) for group in groups)
    return math.sqrt(squares / freedom), freedom


def difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Sequence[float]], n_comparisons: int = 1
) -> Difference:
    """mean(a) − mean(b), the spread being that within all `groups`."""
    value, within = mean(a) - mean(b), pooled(groups)
    if within is None:
        return Difference(value=value, interval=None, spread=None)
    spread, freedom = within
    reach = quantile(1 - (1 - LEVEL) / n_comparisons, freedom) * spread * math.sqrt(1 / len(a) + 1 / len(b))
    return Difference(value=value, interval=(value - reach, value + reach), spread=spread)


def within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's t with so many degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(level: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = level."""
    low, high = 0.0, 1.0
    while within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < level else (low, middle)
    return high
