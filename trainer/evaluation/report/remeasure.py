"""The command lines that measure a run as another one was, and what they cannot make alike.

All that draws an image and measures it is on the card of the result to be matched, and goes into the commands: a
protocol's name does not do, since what was named besides went before it. What the new card will say is worked out from
the run's configuration first (`generate` makes it of the same), so that no command is given that ends in "measured
otherwise" again: where the two would differ in a setting that is the run's own, that setting is named instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.base.ending import command as command_line
from storage.base.errors import UserError
from storage.base.options import as_words
from trainer.config.sample import AS_IMAGE, SampleConfig
from trainer.config.tree import override
from trainer.evaluation.generate.noted import Drawn, card_of, read_noted
from trainer.evaluation.options import EvaluateConfig, GenerateConfig
from trainer.evaluation.protocols import PROTOCOLS, WEAKER
from trainer.evaluation.quality.card import DRAWN, Card, as_of_any_method
from trainer.evaluation.quality.measures import PUBLISHED_IMAGES, VERSION
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.alike import Evaluated
from trainer.evaluation.report.cards import apart_in_words
from trainer.evaluation.report.run_record import RunRecord
from trainer.objectives.sampling import noise_levels
from trainer.run.folder import RunFolder

SAMPLERS = {"euler-maruyama": ("sde", False), "euler": ("ode", False), "heun": ("ode", True), "ddpm": ("ddpm", False)}
MOST_STEPS = 100_000  # beyond which a card is not to be believed, nor its noise levels worked out
LABELS = ("random", "balanced")
ROUNDINGS = ("round", "truncate")
NOT_WORKED_OUT = ("weaker_sha256", "decoder_sha256", "seed", "rounding")  # of files, or as asked for
ANY_WEAKER, ANY_REFERENCE = "WEAKER_RUN", "REFERENCE"  # for the user to fill in
GIVEN_STATISTICS = "published"  # of FDr⁶'s divisors, which no images were named for


@dataclass(frozen=True, kw_only=True)
class Again:
    """The command line, "" where none measures alike, and what there is to know of it; "" for nothing."""

    command: str
    note: str = ""

    def row(self, what: str) -> tuple[str, str]:
        """What was to be measured alike and why it was not, with the note, and the command."""
        return f"{what}; {self.note}" if self.note else what, self.command


def measure_alike(run: RunRecord, line: Evaluation, like: Evaluation, way: Evaluated) -> Again:
    """How a run, of which `line` was measured, is measured as `way` says, of which `like` is an example."""
    try:
        checkpoint, note = "latest", ""
        images = _at_hand(run, line, like.card, way)
        in_the_way = _of_metrics(like.card)
        if images is None:
            in_the_way += [*apart_for_good(run, like.card), *_of_decoder(line.card, like.card)]
            checkpoint, note = _checkpoint(run, line)
            in_the_way += [] if checkpoint else [note]
        if in_the_way:
            return Again(command="", note=f"cannot be measured alike: {', '.join(in_the_way)}")
        draws = ""
        if images is None:
            drawing = drawing_like(run, line, like.card, way.n_generated or PUBLISHED_IMAGES, checkpoint)
            images = str(drawing.out)
            draws = f"{command_line('trainer', 'generate', *as_words(drawing))} && "
        measures = command_line("trainer", "evaluate", *as_words(evaluation_like(run, images, like, way)))
    except (UserError, ValueError, ArithmeticError, RuntimeError) as error:  # a card that somebody else wrote
        return Again(command="", note=f"cannot be measured alike: {' '.join(str(error).split())}")
    notes = (note, _note(like.card, draws=bool(draws)))
    return Again(command=f"{draws}{measures}", note="; ".join(filter(None, notes)))


def _note(card: Card, *, draws: bool) -> str:
    if not draws:
        return ""
    unknown = [name for name in card.unknown if name in DRAWN and name != "decoder_sha256"]
    if unknown:
        what = "how images were drawn" if card.of_another_program else _named(unknown)
        return f"{what} is not known of the others, so these compare once all are drawn again"
    if card.guidance_by == WEAKER:
        return f"{ANY_WEAKER} is the run whose averaged weights have the SHA-256 {card.weaker_sha256 or 'not known'}"
    return ""


def _named(fields: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in fields)


# ---- drawing ----------------------------------------------------------------------------------------------------


def drawing_like(run: RunRecord, line: Evaluation, card: Card, n: int, checkpoint: str = "latest") -> GenerateConfig:
    """What `generate` is asked for so that its card has the settings of `card`; what that does not know is left out."""
    asked = {**sample_like(run, card), **_besides(card)}
    if line.card.decoder and line.card.decoder == card.decoder:  # else the run's own, which its latents decide on
        asked["vae"] = card.decoder
    told = json.dumps([n, line.step, {name: getattr(card, name) for name in DRAWN}], sort_keys=True)
    out = RunFolder(run.path).drawn(f"of-{n}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
    return GenerateConfig(run=run.path, n=n, out=out, checkpoint=checkpoint, **asked)


def _checkpoint(run: RunRecord, line: Evaluation) -> tuple[str, str]:
    """The step that was measured, where its checkpoint is there still; else the newest, and that it is another one.

    "" where no checkpoint is left, and that.
    """
    if line.step in (None, run.checkpoint_step):
        return "latest", ""
    if line.step in RunFolder(run.path).checkpoint_folders():
        return str(line.step), ""
    if not run.checkpoint_step:
        return "", f"the checkpoint of step {line.step:,} is gone, and no other is left"
    return "latest", f"its checkpoint of step {line.step:,} is gone, so this is of step {run.checkpoint_step:,}"


def sample_like(run: RunRecord, card: Card) -> dict[str, Any]:
    """The sampler's settings by the names that `generate` has for them, of a card, as far as they apply to the run."""
    sampler, heun = SAMPLERS.get(card.sampler or "", (None, None))
    asked: dict[str, Any] = {"sampler": sampler, "heun": heun, "steps": card.steps, "shift": card.shift}
    asked["labels"] = card.labels if card.labels in LABELS else None
    asked["end"] = _end(card) if sampler == "ode" else 0.0 if sampler else None
    asked["guidance"] = card.guidance
    guided = card.guidance is not None and card.guidance > 1
    if guided:
        asked |= {name: getattr(card, name) for name in ("guidance_low", "guidance_high", "guidance_channels")}
    if run.config.model.class_token:
        of_another = card.class_noise == ""  # images of a model without class token: it goes with the image
        asked["class_noise"] = card.class_noise or ("own" if of_another else None)
        if guided:
            names = ("guidance_class", "guidance_class_low", "guidance_class_high")
            asked |= {name: AS_IMAGE if of_another else getattr(card, name) for name in names}
    return {name: value for name, value in asked.items() if value is not None}


def _end(card: Card) -> float | None:
    """The level before the shift at which a sampler ends that came to the card's after it, to the last bit."""
    if card.steps is None or not card.shift or card.times_end is None:
        return None
    near = card.times_end / (card.shift - (card.shift - 1) * card.times_end)
    around = (float(f"{near:.6g}"), near, math.nextafter(near, 0), math.nextafter(near, 1))
    samples = {end: SampleConfig(sampler="ode", steps=card.steps, shift=card.shift, end=end) for end in around}
    return next((end for end, sample in samples.items() if noise_levels(sample)[-1] == card.times_end), near)


def _besides(card: Card) -> dict[str, Any]:
    """What else `generate` is told."""
    arithmetic, _, device = (card.precision or "").partition(" on ")
    asked: dict[str, Any] = {"seed": card.seed, "precision": arithmetic, "device": device}
    asked["rounding"] = card.rounding if card.rounding in ROUNDINGS else None
    asked["protocol"] = card.protocol if card.protocol in PROTOCOLS else None
    asked["weaker"] = Path(ANY_WEAKER) if card.guidance_by == WEAKER else None
    return {name: value for name, value in asked.items() if value not in (None, "")}


def _of_decoder(mine: Card, its: Card) -> list[str]:
    """A decoder is of the run's latents, and another's would make noise of them."""
    if not mine.decoder or not its.decoder or mine.decoder == its.decoder:
        return []
    return [f"decoder {mine.decoder}, not {its.decoder}"]


def _of_metrics(card: Card) -> list[str]:
    if card.metrics_version in (None, VERSION):
        return []
    return [f"metrics version {VERSION}, not {card.metrics_version}, by which the other was measured"]


def apart_for_good(run: RunRecord, card: Card) -> list[str]:
    """In what images of the run would be drawn otherwise than `card` says, whatever `generate` is told, in words."""
    if card.of_another_program:
        return []
    if not 0 < (card.steps or 1) <= MOST_STEPS:
        return [f"steps {card.steps}"]
    asked = sample_like(run, card)
    if "guidance" in asked:
        asked.setdefault("guidance_class", AS_IMAGE)
    arithmetic, _, device = (card.precision or "fp32 on cpu").partition(" on ")
    recipe = override(run.config, {"precision": arithmetic, **{f"sample.{name}": each for name, each in asked.items()}})
    if not recipe.sample.shift:  # as in training, of which the card does not say what it comes to
        return []
    classes = run.summary.classes if run.summary.classes is not None else card.classes
    drawn = Drawn(
        run=run.path, step=0, checkpoint_sha256="", classes=1 if classes is None else classes, seed=0, decoder="",
        decoder_sha256=None, weaker_sha256="its own" * (card.guidance_by == WEAKER), rounding="",
        device=torch.device(device), protocol="",
    )  # fmt: skip
    unknown = {name for name in DRAWN if getattr(card, name) is None}
    told = {*unknown, *set(vars(card)) - set(DRAWN), *NOT_WORKED_OUT}
    return apart_in_words(as_of_any_method(card_of(recipe, drawn)), as_of_any_method(card), told)


def _at_hand(run: RunRecord, line: Evaluation, card: Card, way: Evaluated) -> str | None:
    """Images of the run that are drawn as `card` says, in the number of the way; None where there are none."""

    def is_like(drawn: Card, n: int | None) -> bool:
        n_alike = way.n_generated is None or n == way.n_generated
        mine, its = as_of_any_method(drawn), as_of_any_method(card)
        return n_alike and all(getattr(mine, name) == getattr(its, name) for name in DRAWN)

    if line.generated.path is not None and is_like(line.card, line.generated.n):
        return line.generated.path
    step = line.step if line.step is not None else run.checkpoint_step
    for drawn in reversed(run.drawn):
        noted = read_noted(drawn.folder)
        if noted.step == step and is_like(noted, drawn.n):
            return str(drawn.folder)
    return None


# ---- measuring --------------------------------------------------------------------------------------------------


def evaluation_like(run: RunRecord, images: str, like: Evaluation, way: Evaluated) -> EvaluateConfig:
    """What `evaluate` is asked for so that it measures images as `like` was."""
    encoder = str(like.encoder.get("name", way.name))
    held_out = like.asked.get("held_out") or like.encoder.get("held_out")
    n_reference, weights, resamples = (like.asked.get(name) for name in ("n_reference", "weights", "resamples"))
    draws: dict[str, Any] = {} if resamples is None else {"resamples": int(resamples)}
    return EvaluateConfig(
        images=Path(images),
        reference=str(like.asked.get("reference") or like.reference.path or ANY_REFERENCE),
        encoder=encoder,
        token="mean" if like.encoder.get("vector") == "mean" else "cls",
        resolution=way.resolution,
        n_reference=n_reference if isinstance(n_reference, int) else way.n_reference or 0,
        held_out=Path(str(held_out)) if held_out not in (None, GIVEN_STATISTICS) else None,
        run=run.path,
        weights=None if weights is None else Path(str(weights)),
        **draws,
    )
