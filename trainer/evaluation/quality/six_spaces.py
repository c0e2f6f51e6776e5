"""What FDr⁶'s result has of its six spaces' results: the card, the interval, the bias, and the warnings.

FDr⁶ is linear in the six distances, so its line in 1/N is the mean of theirs, each over its divisor. Its interval is
the mean of theirs too, as if the six moved together: the deviation of a mean is at most the mean of the deviations, so
that it is not too narrow. It holds the choice of the generated images, of neither reference nor held-out images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.base.choices import INCEPTION
from storage.base.shown import shown
from storage.roots import absolute
from trainer.config.presets import IMAGENET
from trainer.evaluation.quality.card import SPACES, Card, card_in
from trainer.evaluation.quality.departures import departures_of

PUBLISHED_OF = "published"
SIDE = 256  # of the images that the published divisors are of
# Statistics of ImageNet's training set say so in their file's name alone: VIRTUAL_imagenet256_labeled, in256-fdr-clip.
NAMED_IMAGENET = re.compile(r"(?<!tiny)(?<!tiny[-_])imagenet([-_]?(256|1k)|(?![a-z])(?![-_]?\d))|(?<![a-z])in(256|1k)")
OTHERS = re.compile(r"(?<![a-z])(val\w*|test|subset|sketch|v2|a|c|o|r)(?![a-z])")  # which are not its training set
Results = Mapping[str, Mapping[str, Any]]  # space → what `evaluate` gave


def card_of_spaces(results: Results, divisors: Mapping[str, float], divisors_of: str | None, reference: Any) -> Card:
    """The card of the mean, of the cards of its spaces; `divisors_of` is PUBLISHED_OF or the held-out images' digest.

    What is not alike in all six is named by space, or combined into a SHA-256 where it is digests.
    """
    cards = {name: card_in(result) for name, result in results.items()}
    counts = {card.n_reference for card in cards.values()}
    digests = _by_space(cards, "reference_sha256")
    card = replace(
        cards[INCEPTION],
        reference=absolute(reference),
        reference_sha256=_combined([card.reference_sha256 for card in cards.values()]),
        references_sha256=digests,
        n_reference=counts.pop() if len(counts) == 1 else None,
        divisors=tuple(f"{name} {value:.9g}" for name, value in divisors.items()),
        divisors_of=divisors_of,
        extractor=SPACES,
        extractor_sha256=_combined([card.extractor_sha256 for card in cards.values()]),
        extractor_vector=_joined(cards, "extractor_vector"),
        extractor_resize=_joined(cards, "extractor_resize"),
        extractor_precision=_joined(cards, "extractor_precision"),
    )
    return replace(card, departures=departures_of(card))


def _combined(digests: Sequence[str | None]) -> str | None:
    known = [digest for digest in digests if digest is not None]
    return hashlib.sha256("".join(known).encode()).hexdigest() if len(known) == len(digests) else None


def _by_space(cards: Mapping[str, Card], field: str) -> tuple[str, ...] | None:
    values = {name: getattr(card, field) for name, card in cards.items()}
    return None if None in values.values() else tuple(f"{name} {value}" for name, value in values.items())


def _joined(cards: Mapping[str, Card], field: str) -> str | None:
    """The value of all, or each space's."""
    values = {getattr(card, field) for card in cards.values()}
    if len(values) == 1:
        return values.pop()
    named = _by_space(cards, field)
    return None if named is None else "; ".join(named)


def distance_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metric that is the Fréchet distance."""
    metrics: Mapping[str, Mapping[str, Any]] = result["metrics"]
    return metrics.get("fid") or metrics["fd"]


def interval_of_spaces(results: Results, divisors: Mapping[str, float]) -> dict[str, Any]:
    """As of every metric, where all six have one."""
    of_spaces = {name: distance_of(result) for name, result in results.items()}
    if not all("interval" in metric for metric in of_spaces.values()):
        return {}
    first = of_spaces[INCEPTION]
    return {
        "interval": [_mean({n: m["interval"][end] for n, m in of_spaces.items()}, divisors) for end in (0, 1)],
        "deviation": _mean({name: metric["deviation"] for name, metric in of_spaces.items()}, divisors),
        **{name: first[name] for name in ("resampled", "resamples", "resampling_seed") if name in first},
    }


def bias_of_spaces(results: Results, divisors: Mapping[str, float]) -> dict[str, Any]:
    """How the mean falls with the number of images, where that is known of all six for the same numbers."""
    biases = {name: result.get("bias", {}) for name, result in results.items()}
    lines = {name: bias.get("fid") or bias.get("fd") for name, bias in biases.items()}
    if None in lines.values() or len({tuple(line["sizes"]) for line in lines.values()}) > 1:
        return {}
    sizes = lines[INCEPTION]["sizes"]
    return {
        SPACES: {
            "sizes": sizes,
            "values": [_mean({n: line["values"][i] for n, line in lines.items()}, divisors) for i in range(len(sizes))],
            "infinity": _mean({name: line["infinity"] for name, line in lines.items()}, divisors),
        }
    }


def _mean(values: Mapping[str, float], divisors: Mapping[str, float]) -> float:
    return sum(value / divisors[name] for name, value in values.items()) / len(values)


def warnings_of_spaces(results: Results, divisors_of: str | None) -> list[str]:
    """Those of all spaces, each once, and one where the published divisors are of another reference."""
    warnings = list(dict.fromkeys(text for result in results.values() for text in result["warnings"]))
    others = [name for name, result in results.items() if not _is_imagenet(result["reference"])]
    if divisors_of == PUBLISHED_OF and others:
        path = shown(str(results[others[0]]["reference"].get("path")))
        warnings.append(
            f"divided by the published distances, which are to ImageNet's training set at {SIDE} px; nothing says that "
            f"{path} is that (in {', '.join(others)}). Measure the divisors with --held-out IMAGES"
        )
    return warnings


def _is_imagenet(reference: Mapping[str, Any]) -> bool:
    """Whether a reference says that it is ImageNet's training set: by its images' number and size, or by its name."""
    if reference.get("kind") != "statistics":
        n = reference.get("n", 0) + reference.get("n_failed", 0)
        return n == IMAGENET and reference.get("size", [SIDE, SIDE]) == [SIDE, SIDE]
    name = Path(str(reference.get("path"))).stem.lower()
    return NAMED_IMAGENET.search(name) is not None and OTHERS.search(name) is None
