"""In what a card departs from the published protocol that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.evaluation.protocols import PROTOCOLS, Protocol
from trainer.evaluation.quality.card import Card

SAMPLERS = {"sde": "euler-maruyama", "ode": "euler", "ddpm": "ddpm"}


def departures_of(card: Card) -> tuple[str, ...] | None:
    """ "field: A, not B" for each setting that is not the protocol's or is unknown; None of a card that names none."""
    protocol = PROTOCOLS.get(card.protocol or "")
    return None if protocol is None else tuple(_departures(card, protocol))


def _departures(card: Card, protocol: Protocol) -> Iterator[str]:
    """In what a card is not as a protocol has it, "field: A, not B" each, what is unknown included."""
    for name, wanted in _wanted(card, protocol):
        found = getattr(card, name)
        if found is None:
            yield f"{name}: unknown, {protocol.name} has {_spelled(wanted)}"
        elif found != wanted:
            yield f"{name}: {_spelled(found)}, not {_spelled(wanted)}"
    if protocol.decoder and _last(card.decoder) != _last(protocol.decoder):
        yield f"decoder: {card.decoder or 'unknown'}, not {protocol.decoder}"
    if _last(card.reference) != protocol.reference:
        yield f"reference: {_last(card.reference) or 'unknown'}, not {protocol.reference}"


def _wanted(card: Card, protocol: Protocol) -> Iterator[tuple[str, Any]]:
    guided = protocol.guidance > 1
    yield "weights", "ema"
    yield "labels", protocol.labels
    yield "sampler", "heun" if protocol.heun else SAMPLERS[protocol.sampler]
    yield "steps", protocol.steps
    if protocol.shift:
        yield "shift", protocol.shift
    if card.shift is not None:  # the level that it ends at comes after the shift
        yield "times_end", protocol.end * card.shift / (1 + (card.shift - 1) * protocol.end)
    yield "guidance", protocol.guidance
    yield "guidance_low", protocol.guidance_low if guided else 0.0
    yield "guidance_high", protocol.guidance_high if guided else 1.0
    yield "guidance_channels", protocol.guidance_channels if guided else 0
    yield "guidance_by", protocol.guidance_by if guided else "nothing"
    if card.class_noise:  # a model with class tokens
        of_class = protocol.guidance if protocol.guidance_class < 0 else protocol.guidance_class
        yield "guidance_class", of_class if guided else 0.0
        low, high = protocol.guidance_class_low, protocol.guidance_class_high
        yield "guidance_class_low", (protocol.guidance_low if low < 0 else low) if guided else 0.0
        yield "guidance_class_high", (protocol.guidance_high if high < 0 else high) if guided else 1.0
    yield "precision", f"{protocol.precision} on cuda"
    yield "rounding", protocol.rounding
    yield "n_images", protocol.n
    yield "extractor", protocol.extractor


def _spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _last(path: str | None) -> str:
    return (path or "").rstrip("/").rpartition("/")[2]
