"""How long a run trained until its unguided FID was 2: the first measured step, in epochs of its data set.

Only Inception's FID of images that were drawn without guidance counts, and of which the card says so: what is not known
is not taken for unguided. Cards of different numbers of images are taken as they are; the step found names its card.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.evaluation.quality.card import Card
from trainer.evaluation.quality.record import Evaluation

TARGET = 2.0


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The first measured step at which a distance was reached."""

    step: int
    epochs: float
    fid: float
    card: Card


def epochs_until(
    evaluations: Iterable[Evaluation], *, batch: int, n_images: int, fid: float = TARGET
) -> Reached | None:
    """The first step of a run's record whose unguided FID is at most `fid`; None where none was measured.

    `batch` is the run's global batch, `n_images` the images of its data set.
    """
    found = [
        Reached(
            step=line.step,
            epochs=line.step * batch / n_images,
            fid=line.metrics["fid"].value,
            card=line.card,
        )
        for line in evaluations
        if line.step is not None and line.card.guidance == 1 and "fid" in line.metrics
    ]
    return min((each for each in found if each.fid <= fid), key=lambda each: each.step, default=None)
