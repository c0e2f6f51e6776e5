"""A card's second half: what was measured with what; and in what it departs from a published protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.feature_file import FeatureFile
from storage.roots import absolute
from trainer.evaluation.protocols import PROTOCOLS, Protocol
from trainer.evaluation.quality.card import Card
from trainer.evaluation.quality.measures import VERSION, Reference
from trainer.run.provenance import version

SAMPLERS = {"sde": "euler-maruyama", "ode": "euler", "ddpm": "ddpm"}


def card_of_result(
    noted: Card, generated: FeatureFile, against: Reference, *, run: Path | None, step: int | None, protocol: str = ""
) -> Card:
    """The whole card, of what `generate` noted and of what was measured."""
    images, identity = generated.images, generated.identity
    card = replace(
        noted,
        run=absolute(run) if run is not None else noted.run,
        step=step if step is not None else noted.step,
        checkpoint_sha256=noted.checkpoint_sha256 if step in (None, noted.step) else None,
        images=_text(images.get("path")),
        images_format=_text(images.get("kind")),
        n_images=images["n"],
        resolution=_size(images.get("size")),
        crop=images.get("resolution") if isinstance(images.get("resolution"), int) else None,
        reference=_text(against.record.get("path")),
        reference_sha256=_text(against.record.get("digest")),
        n_reference=0 if against.statistics_given else against.record.get("n"),
        extractor=generated.label,
        extractor_sha256=identity.weights_sha256,
        extractor_vector=identity.vector,
        extractor_resize=_text(identity.preprocessing),
        extractor_precision=_text(identity.arithmetic) or "",
        metrics_version=VERSION,
        project_version=version(),
        protocol=protocol or noted.protocol or ("" if not noted.of_another_program else None),
    )
    known = PROTOCOLS.get(card.protocol or "")
    return replace(card, departures=tuple(_departures(card, known)) if known else None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _size(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return f"{value[1]}×{value[0]}"
    return None


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
