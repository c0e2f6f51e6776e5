"""The measures of images that have a title, and which of their values is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluation.report.run_record import RunRecord

Better = Literal["lower", "higher"]
INCEPTION = "inception"


@dataclass(frozen=True, kw_only=True)
class Title:
    """How a measure is spelled, and which values are better; `decides` where it may say which method is best."""

    text: str
    better: Better
    decides: bool = True


TITLES = {  # in the order in which they decide, and in which they are shown
    "fid": Title(text="FID", better="lower"),
    "fd": Title(text="Fréchet distance", better="lower"),
    "cmmd": Title(text="CMMD", better="lower"),
    "kid": Title(text="KID", better="lower"),
    "kd": Title(text="Kernel distance", better="lower"),
    "sfid": Title(text="sFID", better="lower"),
    "inception_score": Title(text="Inception Score", better="higher"),
    "precision": Title(text="Precision", better="higher", decides=False),
    "recall": Title(text="Recall", better="higher", decides=False),
    "density": Title(text="Density", better="higher", decides=False),
    "coverage": Title(text="Coverage", better="higher", decides=False),
}


def better(metric: str) -> Better | None:
    """Which values are better; None where that is not known here."""
    known = TITLES.get(metric)
    return known.better if known is not None else "lower" if metric.startswith("fd") else None


def decides(metric: str) -> bool:
    """Whether a measure of this name may say which method is best."""
    known = TITLES.get(metric)
    return known.decides if known is not None else metric.startswith("fd")


def place(metric: str) -> int:
    """Where a measure stands among others."""
    return list(TITLES).index(metric) if metric in TITLES else len(TITLES)


def title(metric: str, name: str) -> str:
    """A measure in an encoder's features, as a heading has it."""
    known = TITLES.get(metric)
    text = known.text if known is not None else metric.replace("_", " ").capitalize()
    return text if name == INCEPTION else f"{text} ({name})"


def measured(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(encoder, measure) of every evaluation, Inception's first, in the order of TITLES."""
    pairs = {(line.name, metric) for run in records for line in run.evaluations for metric in line.metrics}
    return sorted(pairs, key=lambda pair: (pair[0] != INCEPTION, pair[0], place(pair[1]), pair[1]))


def spelled(value: float) -> str:
    """A value, to the digits that may matter."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.3g}"
    return f"{value:.{_decimals(size)}f}"


def with_spread(value: float, spread: float | None) -> str:
    """A mean and its deviation, to the same digits unless these would show nothing of it."""
    if spread is None:
        return spelled(value)
    decimals = _decimals(abs(value))
    alike = spread == 0 or (1e-4 < abs(value) < 1e6 and spread >= 0.5 * 10**-decimals)
    return f"{spelled(value)} ± {f'{spread:.{decimals}f}' if alike else spelled(spread)}"


def _decimals(size: float) -> int:
    return 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.01 else 5
