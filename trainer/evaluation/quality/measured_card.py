"""A card's second half: what was measured with what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.feature_file import FeatureFile
from storage.roots import absolute
from trainer.evaluation.quality.card import Card
from trainer.evaluation.quality.departures import departures_of
from trainer.evaluation.quality.measures import VERSION, Reference
from trainer.run.provenance import version


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
        crop=_crop(images),
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
    return replace(card, departures=departures_of(card))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _crop(images: dict[str, Any]) -> int | None:
    """An archive's images are taken as they are."""
    side = images.get("resolution", 0 if images.get("kind") == "npz" else None)
    return side if isinstance(side, int) else None


def _size(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return f"{value[1]}×{value[0]}"
    return None
