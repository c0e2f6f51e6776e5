"""How images were drawn, as the first half of an evaluation card: written beside the images, and read again.

Images of before there were cards have the settings alone that determine them; what these do not say is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.roots import absolute
from trainer.config.sample import SampleConfig
from trainer.config.schema import TrainConfig
from trainer.evaluation.generate.image_files import NOTED, settings_file_of
from trainer.evaluation.protocols import NULL_LABEL, WEAKER
from trainer.evaluation.quality.card import Card
from trainer.objectives import OBJECTIVES, Objective
from trainer.objectives.sampling import calls_of, class_scale, noise_levels
from trainer.run.provenance import DISTRIBUTION, version

NOTHING = "nothing"
EQUATIONS = {"sde": "sde", "ode": "ode", "ddpm": "chain"}
FIX = "restore the file, or remove it: then how the images were drawn is unknown"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What `generate` knows besides the recipe."""

    run: Path
    step: int
    checkpoint_sha256: str
    classes: int
    seed: int
    decoder: str
    decoder_sha256: str | None
    weaker_sha256: str
    rounding: str
    device: torch.device
    protocol: str


def card_of(recipe: TrainConfig, drawn: Drawn) -> Card:
    """The card's first half."""
    of_project = version()
    return replace(
        card_of_sample(
            recipe.sample,
            OBJECTIVES[recipe.model.kind],
            class_token=recipe.model.class_token,
            weaker=drawn.weaker_sha256,
            unlabelled=not drawn.classes,
        ),
        run=absolute(drawn.run),
        step=drawn.step,
        checkpoint_sha256=drawn.checkpoint_sha256,
        images_by=f"{DISTRIBUTION} {of_project}" if of_project else DISTRIBUTION,
        weights="ema",
        ema_decay=recipe.ema_decay,
        classes=drawn.classes,
        seed=drawn.seed,
        precision=f"{recipe.precision} on {drawn.device.type}",
        decoder=drawn.decoder,
        decoder_sha256=drawn.decoder_sha256,
        rounding=drawn.rounding,
        protocol=drawn.protocol,
    )


def card_of_sample(
    sample: SampleConfig, objective: Objective, *, class_token: bool, weaker: str, unlabelled: bool
) -> Card:
    """What the sampler's settings come to."""
    calls = calls_of(sample, objective, class_token=class_token)
    levels = noise_levels(sample)
    guided = sample.guidance > 1
    of_class = class_scale(sample) if class_token else 0.0
    of_class = 0.0 if of_class == 1 else of_class
    low, high = sample.class_interval if of_class else (0.0, 1.0)
    euler = "heun" if sample.heun else "euler"
    return Card(
        labels="none" if unlabelled else "balanced" if sample.labels == "balanced" else "random",
        sampler={"sde": "euler-maruyama", "ode": euler}.get(sample.sampler, sample.sampler),
        equation=EQUATIONS[sample.sampler],
        steps=sample.steps,
        calls=calls.total,
        guided_calls=calls.guided,
        last_step_from=levels[-2],
        times_end=levels[-1],
        shift=sample.shift,
        guidance=sample.guidance,
        guidance_low=sample.guidance_low if guided else 0.0,
        guidance_high=sample.guidance_high if guided else 1.0,
        guidance_channels=sample.guidance_channels if guided else 0,
        guidance_by=(WEAKER if weaker else NULL_LABEL) if guided or of_class else NOTHING,
        weaker_sha256=weaker,
        guidance_class=of_class,
        guidance_class_low=low,
        guidance_class_high=high,
        class_noise=sample.class_noise if class_token else "",
    )


def kept(card: Card, earlier: Mapping[str, Any] | None, folder: Path) -> Card:
    """The card of images some of which are there: of these nothing is said that was not noted when they were drawn.

    `earlier` is what lies beside them. Raises UserError where they were decoded by other weights of the same name.
    """
    if earlier is None:
        return card
    before = parse_json(Card, json.dumps(earlier[NOTED]), f"the card in {folder}", FIX) if NOTED in earlier else Card()
    was, now = before.decoder_sha256, card.decoder_sha256
    if was and now and was != now:
        raise UserError(
            f"{folder} holds images that {card.decoder} decoded with other weights (SHA-256 {was[:12]}…, are "
            f"{now[:12]}…); name another --out"
        )
    return replace(card, decoder_sha256=was, images_by=before.images_by)


def read_noted(images: Path) -> Card:
    """The card's first half of generated images, a folder or its `.npz`; nothing is known of another program's.

    Raises StoreError for notes that are damaged, or of a later version.
    """
    path = settings_file_of(images)
    try:
        raw = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return Card()
    settings = parse_json(dict[str, Any], raw, str(path), FIX)
    if NOTED in settings:
        return parse_json(Card, json.dumps(settings[NOTED]), f"the card in {path}", FIX)
    return _of_before(settings)


def _of_before(settings: Mapping[str, Any]) -> Card:
    """Of images that were drawn before there were cards, as far as their settings say: always of averaged weights."""
    try:
        known = {each.name: settings[f"sample.{each.name}"] for each in fields(SampleConfig) if each.name != "labels"}
        sample = SampleConfig(**known, labels=settings["labels"])
        noise_levels(sample)
        guided = sample.guidance > 1  # which calls that doubles depends on the kind of model, which is not said
        card = replace(
            card_of_sample(
                sample,
                OBJECTIVES["sit"],
                class_token=False,
                weaker=settings.get("weaker_sha256", ""),
                unlabelled=not settings["classes"],
            ),
            guided_calls=None if guided else 0,
            guidance_class=None if guided else 0.0,
            class_noise=None,
            step=settings["step"],
            checkpoint_sha256=settings["weights_sha256"],
            weights="ema",
            classes=settings["classes"],
            seed=settings["seed"],
            precision=settings["arithmetic"],
            decoder=settings["decoder"],
            rounding="round",
        )
        return parse_json(Card, json.dumps(card.plain()), "settings", FIX)
    except (KeyError, TypeError, ValueError, AssertionError, UserError):  # of another version, or of somebody else
        return Card()
