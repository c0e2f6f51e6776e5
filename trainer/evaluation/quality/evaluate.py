"""`python -m trainer evaluate`: FID, sFID, Inception Score, precision and recall; or a Fréchet distance in any encoder.

The trainer loads no encoder: images are described by `python -m pipeline features`, in a process of its own, into
feature files: the generated ones beside the result, those of a reference in a folder beside the runs, where the next
run's evaluation finds them. Both sets are looked at before either is described, and described once. What is computed
here is arithmetic on two sets of vectors. Every number is published with the counts it was made from, and with a
warning when they are not those of published figures: a Fréchet distance falls with the number of images (its bias is
about 1/N), so only equal counts compare.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.base.choices import INCEPTION
from storage.base.errors import UserError
from storage.base.files import write_atomic
from storage.base.shown import shown
from storage.base.waiting import waiting
from storage.feature_file import FEATURES, SPATIAL, FeatureFile, open_feature_file
from storage.identity import unlike
from storage.roots import absolute
from trainer.evaluation.generate.image_files import step_drawn_at
from trainer.evaluation.generate.noted import read_noted
from trainer.evaluation.protocols import protocol_named
from trainer.evaluation.quality.asked import asked_for
from trainer.evaluation.quality.card import Card
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.frechet import Gaussian, gaussian_of
from trainer.evaluation.quality.intervals import RESAMPLES
from trainer.evaluation.quality.measured_card import card_of_result
from trainer.evaluation.quality.measures import PUBLISHED_IMAGES, Reference, measure
from trainer.evaluation.quality.precision_recall import NEIGHBOURS
from trainer.evaluation.quality.record import record
from trainer.evaluation.quality.reference import Contents, contents, is_named_for, read_statistics
from trainer.evaluation.quality.result_files import file_name, folder_of, result_file
from trainer.ranks.world import device_named
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder

INCEPTION_WIDTH = 2048
CACHE = "reference-features"  # beside the runs
LOOKED_FOR = 3  # folders above the images in which a run is looked for


def evaluate(
    images: Path,
    reference: Path | str,
    description: Description,
    *,
    out: Path | None = None,
    n_reference: int = 0,
    run: Path | None = None,
    step: int | None = None,
    cache: Path | None = None,
    resamples: int = RESAMPLES,
    protocol: str = "",
) -> dict[str, Any]:
    """Measure, write OUT/ENCODER.json (and a line of the run's record), and return what is in it. Raises UserError.

    A reference that is no path is the URL of a store. `cache` is where its features are kept, `resamples` how many
    draws an interval is of (0: none), `protocol` what the card is held against (default: that of the images).
    """
    if protocol:
        protocol_named(protocol)
    if RunFolder(images).is_run:  # whose grids and sets of several settings would be measured as one
        raise UserError(
            f"{images} is a run, and images of one setting are measured; name a folder samples-… in it, or draw and "
            f"measure with `python -m trainer score {images}`"
        )
    device = device_named(description.device)
    of_images, of_reference = contents(images), contents(reference)
    asked = asked_for(reference, description.weights, n_reference=n_reference, resamples=resamples)
    drawn = Path(open_feature_file(images).images["path"]) if of_images.features else images
    step = _step(run, step, drawn)
    if not of_images.features and not of_images.images:
        raise UserError(f"{images} holds statistics only; name the generated images, or their feature file")
    folder = folder_of(images, out)
    generated = images if of_images.features else folder / f"generated-{file_name(description.label)}.npz"
    label = open_feature_file(images).label if of_images.features else description.label
    statistics = _statistics(reference, of_reference, images if of_images.features else None, label)
    features = _reference_file(
        reference, of_reference, cache or _cache(images, run, out, folder), description, n_reference
    )
    sets: list[tuple[Path | str, Path, int]] = []
    if not of_images.features:
        sets.append((images, generated, 0))
    if features is not None and not of_reference.features:
        if label != description.label:
            identity = open_feature_file(images).identity
            raise UserError(
                f"{images} is of {shown(label)}, the reference would be of {description.label}; pass "
                f"--encoder {shown(identity.name)} --token {shown(identity.vector)}"
            )
        sets.append((reference, features, n_reference))
    known = [path for path in (generated, features) if path is not None and path not in [path for _, path, _ in sets]]
    with waiting("reading features"):
        for path in known:  # a bad one is found before the other is described
            open_feature_file(path).read(FEATURES)
    if sets:
        description.describe(sets, known[0] if known else None)
    with waiting("reading the reference's features, and their mean and covariance"):
        against = _opened(reference, features, statistics, generated)
    file = open_feature_file(generated)
    card = card_of_result(read_noted(drawn), file, against, run=run, step=step, protocol=protocol)
    return _result(file, against, card, asked, device, folder, run, step, resamples)


def require_ready(
    reference: Path | str, description: Description, *, images: Path, side: int, n_reference: int = 0,
    run: Path | None = None, cache: Path | None = None,
) -> None:  # fmt: skip
    """Whether images of `side` pixels that are yet to be drawn at `images` could be compared with a reference.

    Ends as `evaluate` would where weights or the reference are missing or do not fit, in seconds and with nothing made.
    """
    device_named(description.device)
    of_reference = contents(reference)
    _statistics(reference, of_reference, None, description.label)
    folder = images.with_name(f"{images.name}-evaluation")
    where = cache or _cache(images, run, None, folder)
    features = _reference_file(reference, of_reference, where, description, n_reference)
    with tempfile.TemporaryDirectory() as aside:
        blank = Path(aside) / "blank.npz"
        np.savez(blank, arr_0=np.zeros((NEIGHBOURS + 1, side, side, 3), dtype=np.uint8))
        sets: list[tuple[Path | str, Path, int]] = [(blank, Path(aside) / "out.npz", 0)]
        like = features if of_reference.features else None
        if like is not None:
            open_feature_file(like).read(FEATURES)
        elif features is not None:  # where it is described by other weights, it is described again
            sets.append((reference, features, n_reference))
        description.describe(sets, like, check=True)


def _cache(images: Path, run: Path | None, out: Path | None, folder: Path) -> Path:
    """Where a reference's features are kept: beside the runs, or beside the images; with --out and no run, there."""
    above = [images.absolute(), *images.absolute().parents][:LOOKED_FOR]
    runs = [run] if run is not None else [path for path in above if RunFolder(path).is_run]
    beside = runs[0].absolute().parent if runs else images.absolute().parent
    if (not runs and out is not None) or not os.access(beside, os.W_OK):
        return folder
    return beside / CACHE


def _reference_file(
    reference: Path | str, against: Contents, cache: Path, description: Description, limit: int
) -> Path | None:
    """The feature file of the reference, there or to be made; None where it has statistics only."""
    if against.features:
        return Path(reference)
    if not against.images:
        return None
    of_place = f"{absolute(reference)}\0{description.resolution}\0{limit}".encode("utf-8", "surrogateescape")
    place = hashlib.sha256(of_place).hexdigest()[:8]
    name = file_name(Path(str(reference).rstrip("/")).name.removesuffix(".npz")) or "reference"
    return cache / f"{name}-{place}-{file_name(description.label)}.npz"


def _statistics(
    reference: Path | str, against: Contents, generated: Path | None, label: str
) -> tuple[Gaussian, Gaussian | None] | None:
    """What a reference gives of statistics: Inception's, or those of the extractor that its name ends in.

    Raises UserError when they do not fit.
    """
    if not against.statistics or (label != INCEPTION and not is_named_for(Path(reference), file_name(label))):
        if against.images or against.features:
            return None
        raise UserError(
            f"{reference} holds Inception's statistics and no images; {shown(label)} needs them, or a feature file, or "
            f"its own statistics in a file whose name ends in -{file_name(label)}.npz"
        )
    pooled, spatial = read_statistics(Path(reference))
    width = INCEPTION_WIDTH if label == INCEPTION else len(pooled.mean)
    if generated is not None:
        width = open_feature_file(generated).read(FEATURES).shape[1]
    if len(pooled.mean) != width:
        what = "Inception's" if label == INCEPTION else f"{shown(label)}'s"
        raise UserError(f"{reference} has a mean of {len(pooled.mean)} numbers, {what} features have {width}")
    return pooled, spatial if label == INCEPTION else None


def statistics_sha256(reference: Path | str, label: str) -> str | None:
    """The digest that a card has of a reference's statistics; None where it has not these alone."""
    found = contents(reference)
    if found != Contents(statistics=True):
        return None
    statistics = _statistics(reference, found, None, label)
    return _digest(*statistics) if statistics is not None else None


def _result(
    generated: FeatureFile, against: Reference, card: Card, asked: dict[str, Any], device: torch.device,
    folder: Path, run: Path | None, step: int | None, resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure and write."""
    metrics, bias = measure(generated, against, device, resamples)
    result: dict[str, Any] = {
        "name": generated.label,
        "encoder": generated.identity.plain(),
        "generated": generated.images,
        "reference": against.record,
        "asked": asked,
        "metrics": metrics,
        "bias": bias,
        "card": card.plain(),
        "warnings": _warnings(generated, against),
    }
    write_atomic(result_file(folder, generated.label), json.dumps(result, indent=1).encode(), "evaluate")
    if run is not None:
        record(run, step, result)
    return result


def _step(run: Path | None, step: int | None, images: Path) -> int | None:
    """The step of the run that the images are of: as said, else as `generate` noted it, else the newest."""
    if run is None:
        if step is not None:
            raise UserError("--step says which step of --run the images are of; pass --run RUN as well")
        return None
    if not RunFolder(run).is_run:
        raise UserError(f"--run {run} is not a run (it has no config.yaml); name a folder that `make train` wrote")
    if step is None:
        step = step_drawn_at(images)
    if step is not None:
        return step
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint, so the step of these images is unknown; mend --run or pass --step")
    return read_state(checkpoint).step


def _opened(
    reference: Path | str,
    features: Path | None,
    statistics: tuple[Gaussian, Gaussian | None] | None,
    generated_file: Path,
) -> Reference:
    """What is compared with, once it is described. Raises UserError when it was described otherwise."""
    file = open_feature_file(features) if features is not None else None
    generated = open_feature_file(generated_file)
    if file is not None and (values := unlike(generated.identity, file.identity)):
        raise UserError(f"generated images and reference are described differently ({values}); describe both alike")
    if statistics is not None:
        record = {"kind": "statistics", "path": absolute(reference), "digest": _digest(*statistics)}
        pooled, spatial = statistics
        return Reference(pooled=pooled, spatial=spatial, features=file, statistics_given=True, record=record)
    assert file is not None
    return Reference(
        pooled=gaussian_of(file.read(FEATURES)),
        spatial=gaussian_of(file.read(SPATIAL)) if SPATIAL in file.arrays else None,
        features=file,
        statistics_given=False,
        record=file.images,
    )


def _digest(*gaussians: Gaussian | None) -> str:
    sha = hashlib.sha256()
    for gaussian in gaussians:
        if gaussian is not None:
            sha.update(np.ascontiguousarray(gaussian.mean).tobytes())
            sha.update(np.ascontiguousarray(gaussian.covariance).tobytes())
    return sha.hexdigest()


def _warnings(generated: FeatureFile, against: Reference) -> list[str]:
    n, width = generated.images["n"], len(against.pooled.mean)
    warnings = []
    if n != PUBLISHED_IMAGES:
        warnings.append(f"{n:,} images; published figures are of {PUBLISHED_IMAGES:,}, and fewer give larger distances")
    if n <= width:
        warnings.append(
            f"{n:,} images do not determine the covariance of {width:,} features; compare equal counts only"
        )
    if generated.label == INCEPTION and not generated.identity.published_weights:
        warnings.append("Inception's weights are not the published ones; no number here compares with any other")
    if against.features is None:
        warnings.append("the reference has no images, so there is no precision and no recall")
    for what, of in (("generated", generated.images), ("reference", against.record)):
        if of.get("n_failed"):
            name, reason = of["failed"][0]
            warnings.append(
                f"{of['n_failed']:,} {what} images could not be read and are left out, the first {shown(name)} "
                f"({shown(reason)})"
            )
    return warnings
