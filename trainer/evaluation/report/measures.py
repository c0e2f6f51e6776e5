"""The measures of images that have a title, and which of their values is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluation.quality.card import SPACES
from trainer.evaluation.report.run_record import RunRecord

Better = Literal["lower", "higher"]
INCEPTION = "inception"


@dataclass(frozen=True, kw_only=True)
class Title:
    """How a measure is spelled, what it is, which values are better; `decides` where it may say which method leads."""

    text: str
    better: Better
    words: str
    decides: bool = True


DISTANCE = "how far the features of drawn images lie from those of real ones"
TITLES = {  # in the order in which they decide, and in which they are shown
    "fid": Title(text="FID", better="lower", words=f"{DISTANCE}: Fréchet distance of Inception's features"),
    SPACES: Title(
        text="FDr⁶",
        better="lower",
        words="Fréchet distance over that of held-out real images, the mean over six networks' features",
    ),
    "fd": Title(text="Fréchet distance", better="lower", words=f"{DISTANCE}: Fréchet distance"),
    "cmmd": Title(text="CMMD", better="lower", words=f"{DISTANCE}: by a kernel, in CLIP's features"),
    "kid": Title(text="KID", better="lower", words=f"{DISTANCE}: by a cubic kernel, in Inception's features"),
    "kd": Title(text="Kernel distance", better="lower", words=f"{DISTANCE}: by a cubic kernel"),
    "sfid": Title(text="sFID", better="lower", words=f"{DISTANCE}: of Inception's features that keep places"),
    "inception_score": Title(
        text="Inception Score", better="higher", words="how surely and how diversely Inception names drawn images"
    ),
    "precision": Title(
        text="Precision", better="higher", decides=False, words="share of drawn images that lie among real ones"
    ),
    "recall": Title(
        text="Recall", better="higher", decides=False, words="share of real images that lie among drawn ones"
    ),
    "density": Title(
        text="Density", better="higher", decides=False, words="how densely drawn images lie where real ones do"
    ),
    "coverage": Title(
        text="Coverage", better="higher", decides=False, words="share of real images with a drawn one near them"
    ),
}


def explained(metric: str, name: str) -> str:
    """What a measure in an encoder's features is, and which values are better, in words."""
    known, sense = TITLES.get(metric), better(metric)
    what = known.words if known is not None else "a measure that this version has no words for"
    features = (
        "" if name in (INCEPTION, metric) or "Inception" in what or "CLIP" in what else f", in the features of {name}"
    )
    return f"{what}{features}{f'; {sense} is better' if sense else ''}"


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
    return text if name in (INCEPTION, metric) else f"{text} ({name})"


def measured(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(encoder, measure) of every evaluation, Inception's first, in the order of TITLES."""
    pairs = {(line.name, metric) for run in records for line in run.evaluations for metric in line.metrics}
    return sorted(pairs, key=lambda pair: (pair[0] != INCEPTION, pair[0], place(pair[1]), pair[1]))


def spelled(value: float) -> str:
    """A value, to the digits that may matter."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.3g}"
    return f"{value:.{_decimals(size)}f}"


def span(low: float, high: float) -> str:
    """Two ends, to the same digits unless one is very large or small."""
    if any(abs(end) >= 1e6 or 0 < abs(end) < 1e-4 for end in (low, high)):
        return f"{spelled(low)} to {spelled(high)}"
    decimals = max(_decimals(abs(end)) for end in (low, high) if end or low == high)
    return " to ".join("0" if end == 0 else f"{end:.{decimals}f}" for end in (low, high))


def with_spread(value: float, spread: float | None) -> str:
    """A mean and its deviation, to the same digits unless these would show nothing of it."""
    if spread is None:
        return spelled(value)
    decimals = _decimals(abs(value))
    alike = spread == 0 or (1e-4 < abs(value) < 1e6 and spread >= 0.5 * 10**-decimals)
    return f"{spelled(value)} ± {f'{spread:.{decimals}f}' if alike else spelled(spread)}"


def _decimals(size: float) -> int:
    return 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.01 else 5
