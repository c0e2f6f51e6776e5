"""In what a card departs from the published protocol that it names.

Held against it is every field of the card that the protocol fixes. How images were drawn is what `generate` would note
of the protocol's own settings, so that nothing is spelled twice. Three things are not what the release has, but as near
as is known here: decoder and reference go by their names, an extractor's weights by the first digits of their SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config.sample import SampleConfig
from trainer.evaluation.generate.noted import card_of_sample
from trainer.evaluation.protocols import PROTOCOLS, WEAKER, Protocol, of_sample
from trainer.evaluation.quality.card import Card
from trainer.evaluation.quality.measures import VERSION
from trainer.objectives import OBJECTIVES

OF_SAMPLER = (
    "labels", "sampler", "steps", "shift", "times_end", "guidance", "guidance_low", "guidance_high",
    "guidance_channels", "guidance_by",
)  # fmt: skip
OF_CLASS_TOKEN = ("guidance_class", "guidance_class_low", "guidance_class_high")
# What these come to, told where nothing else is: they say no more than the setting that they follow from.
DERIVED = ("equation", "calls", "guided_calls", "last_step_from")
HASH = 64  # letters of a SHA-256
Departures = Iterator[tuple[str, Any, Any]]  # field, what the card has, what the protocol has


def departures_of(card: Card) -> tuple[str, ...] | None:
    """ "field: A, not B" for each setting that is not the protocol's or is unknown; None of a card that names none."""
    protocol = PROTOCOLS.get(card.protocol or "")
    if protocol is None:
        return None
    drawn = _as_drawn(card, protocol)
    found = list(_departing(card, protocol, drawn)) or list(_unlike(card, {n: getattr(drawn, n) for n in DERIVED}))
    return tuple(_in_words(*each, protocol.name) for each in found)


def _as_drawn(card: Card, protocol: Protocol) -> Card:
    """What `generate` notes of images that are drawn as the protocol has it, from a model like the card's."""
    settings = {name.removeprefix("sample."): value for name, value in of_sample(protocol).items()}
    settings["shift"] = protocol.published_shift
    return card_of_sample(
        SampleConfig(**settings),
        OBJECTIVES[protocol.kind],
        class_token=bool(card.class_noise),
        weaker="a weaker model" if protocol.guidance_by == WEAKER else "",
        unlabelled=False,
    )


def _departing(card: Card, protocol: Protocol, drawn: Card) -> Departures:
    wanted: dict[str, Any] = {"weights": "ema", "ema_decay": protocol.ema_decay}
    wanted |= {name: getattr(drawn, name) for name in OF_SAMPLER}
    wanted["classes"] = protocol.classes
    if card.class_noise:  # a model with class tokens
        wanted |= {name: getattr(drawn, name) for name in OF_CLASS_TOKEN}
    if card.class_noise != "":
        wanted["class_noise"] = protocol.class_noise
    wanted |= {"precision": f"{protocol.precision} on cuda", "rounding": protocol.rounding, "n_images": protocol.n}
    wanted |= {"resolution": f"{protocol.resolution}×{protocol.resolution}", "crop": 0}
    wanted |= {"metrics_version": VERSION, "extractor": protocol.extractor}
    yield from _unlike(card, wanted)
    if card.extractor == protocol.extractor:
        yield from _of_extractor(card, protocol)
    if protocol.decoder and _last(card.decoder) != _last(protocol.decoder):
        yield "decoder", card.decoder or None, protocol.decoder
    if _last(card.reference) != protocol.reference:
        yield "reference", _last(card.reference) or None, protocol.reference
    else:
        yield from _unlike(card, {"n_reference": protocol.n_reference})


def _of_extractor(card: Card, protocol: Protocol) -> Departures:
    if not (card.extractor_sha256 or "").startswith(protocol.extractor_sha256):
        yield "extractor_sha256", card.extractor_sha256, f"{protocol.extractor_sha256}…"
    vector, resize = protocol.extractor_vector, protocol.extractor_resize
    yield from _unlike(card, {"extractor_vector": vector, "extractor_resize": resize, "extractor_precision": ""})


def _unlike(card: Card, wanted: dict[str, Any]) -> Departures:
    for name, value in wanted.items():
        if getattr(card, name) != value:
            yield name, getattr(card, name), value


def _in_words(name: str, found: Any, wanted: Any, protocol: str) -> str:
    if found is None:
        return f"{name}: unknown, {protocol} has {_spelled(wanted)}"
    return f"{name}: {_spelled(found)}, not {_spelled(wanted)}"


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value) or "none"
    return f"{text[:12]}…" if len(text) == HASH else text


def _last(path: str | None) -> str:
    return (path or "").rstrip("/").rpartition("/")[2]
