"""What is to be drawn, decided before anything is: recipe, checkpoint, decoder, folder, and what determines an image.

Everything that `generate` refuses for what it was asked or for what it lacks is refused here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.base.options import flag_of
from storage.base.shown import LONGEST, shown
from trainer.config.sample import AS_IMAGE
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, leaves, override
from trainer.evaluation.generate.decode import decoder_of, decoder_sha256
from trainer.evaluation.generate.feature_decoder import require_decoder
from trainer.evaluation.generate.image_files import NOTED, SETTINGS_FILE, n_written
from trainer.evaluation.generate.noted import Drawn, card_of, kept
from trainer.evaluation.options import GenerateConfig
from trainer.evaluation.protocols import WEAKER, Protocol, of_sample, protocol_named
from trainer.objectives import OBJECTIVES
from trainer.objectives.sampling import class_scale
from trainer.run.checkpoint import EMA_WEIGHTS
from trainer.run.folder import RunFolder
from trainer.run.opened import OpenRun, checkpoints_of, open_run, step_of
from trainer.run.settings import with_shifts

VERSION = 1
IN_NAME = (  # where they are given
    "guidance_low", "guidance_high", "guidance_class_low", "guidance_class_high", "guidance_channels", "heun", "shift",
    "end",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weaker:
    """A run that guidance leads away from."""

    run: OpenRun
    checkpoint: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be drawn. `config` has labels and rounding written out."""

    run: OpenRun
    checkpoint: Path
    recipe: TrainConfig
    config: GenerateConfig
    decoder: str
    weaker: Weaker | None
    folder: Path
    settings: dict[str, Any]


def plan(config: GenerateConfig, device: torch.device) -> Plan:
    """Raises UserError."""
    run = open_run(config.run)
    run.scale  # noqa: B018 - statistics that are gone or damaged are found before hours of drawing, not after
    run.data.close()  # only what it says is needed, not its rows
    checkpoint = _one_checkpoint(config)
    protocol = protocol_named(config.protocol) if config.protocol else None
    recipe = _recipe(run, config, protocol, device)
    rounding = config.rounding or (protocol.rounding if protocol else "round")
    config = dataclasses.replace(config, labels=recipe.sample.labels, rounding=rounding)
    decoder = config.vae or decoder_of(run.data, run.config)
    if not decoder:
        what = "a folder or hub id of diffusers' AutoencoderRAE" if run.data.of_features else "a diffusers directory"
        raise UserError(f"{run.data.latents.path} does not say what decodes it; pass --vae with {what}")
    if run.data.of_features:
        require_decoder(decoder, run.data.latents)
    weaker = _weaker(config.weaker, run, recipe) if config.weaker is not None else None
    if not run.geometry.n_classes and recipe.sample.guidance > 1 and weaker is None:
        raise UserError(
            f"{config.run} was trained without labels, so there is no class to guide towards; leave --guidance at "
            f"1, got {recipe.sample.guidance:g}"
        )
    settings = _settings(config, recipe, checkpoint, decoder, run.geometry.n_classes, device)
    if weaker is not None:
        settings["weaker_sha256"] = _sha256(weaker.checkpoint)
    drawn = Drawn(
        run=config.run,
        step=settings["step"],
        checkpoint_sha256=settings["weights_sha256"],
        classes=run.geometry.n_classes,
        seed=config.seed,
        decoder=decoder,
        decoder_sha256=decoder_sha256(decoder),
        weaker_sha256=settings.get("weaker_sha256", ""),
        rounding=rounding,
        device=device,
        protocol=config.protocol,
    )
    folder = config.out or RunFolder(config.run).drawn(_name(recipe, config, step_of(checkpoint)))
    settings[NOTED] = kept(card_of(recipe, drawn), _earlier(folder, settings), folder).plain()
    return Plan(
        run=run, checkpoint=checkpoint, recipe=recipe, config=config, decoder=decoder, weaker=weaker, folder=folder,
        settings=settings,
    )  # fmt: skip


def _one_checkpoint(config: GenerateConfig) -> Path:
    chosen = checkpoints_of(config.run, config.checkpoint)
    if len(chosen) > 1:
        raise UserError(f"--checkpoint {config.checkpoint} names {len(chosen)} checkpoints; images are of one")
    return chosen[0]


def _weaker(path: Path, run: OpenRun, recipe: TrainConfig) -> Weaker:
    """Raises UserError where it is of other latents, classes or outputs than the run, or guides nothing."""
    if recipe.sample.guidance == 1:
        raise UserError(f"--weaker {path} has nothing to guide with --guidance 1; give a scale above 1")
    weaker = open_run(path)
    weaker.data.close()
    ours, theirs = run.geometry, weaker.geometry
    for what, a, b in (
        ("latents", run.data.latents.identity_digest[:12], weaker.data.latents.identity_digest[:12]),
        ("a map of latents", str(run.scale), str(weaker.scale)),
        ("a state", ours.state_shape, theirs.state_shape),
        ("classes", ours.n_classes, theirs.n_classes),
        ("a path", run.config.loss.path, weaker.config.loss.path),
    ):
        if a != b:
            raise UserError(f"--weaker {path} has {what} {b}, {run.path} has {a}; name a run like it")
    our_objective, their_objective = OBJECTIVES[ours.kind], OBJECTIVES[theirs.kind]
    if (our_objective.velocity, our_objective.model_times) != (their_objective.velocity, their_objective.model_times):
        raise UserError(
            f"--weaker {path} is of --model.kind {theirs.kind}, whose outputs are not those of {ours.kind}; name a run "
            "like it"
        )
    return Weaker(run=weaker, checkpoint=checkpoints_of(path)[0])


SAMPLE_OPTIONS = (
    "sampler", "steps", "heun", "shift", "end", "guidance", "guidance_low", "guidance_high", "guidance_channels",
    "guidance_class", "guidance_class_low", "guidance_class_high", "class_noise", "labels",
)  # fmt: skip


def _recipe(run: OpenRun, config: GenerateConfig, protocol: Protocol | None, device: torch.device) -> TrainConfig:
    """The run's configuration with the sampler and precision that the protocol has, and those that are asked for."""
    precision = config.precision
    if precision == "auto":  # the published figures were sampled in float32 with TF32 matrix products
        on_gpu = protocol.precision if protocol else "tf32"
        precision = on_gpu if device.type == "cuda" else "fp32"
    asked = {f"sample.{name}": getattr(config, name) for name in SAMPLE_OPTIONS}
    if config.guidance is not None and config.guidance_class is None:  # whatever number the run was saved with
        asked["sample.guidance_class"] = AS_IMAGE
    for name in ("guidance_class", "guidance_class_low", "guidance_class_high", "class_noise"):
        value = getattr(config, name)
        if value is not None and not run.config.model.class_token:
            raise UserError(f"{flag_of(name)} {value} is of a class token; {config.run} has none")
    if config.sampler not in (None, "ode"):
        asked |= {n: v for n, v in (("sample.heun", False), ("sample.end", 0.0)) if asked[n] is None}
    of_protocol = of_sample(protocol) if protocol else {}
    named = {name: value for name, value in asked.items() if value is not None}
    recipe = override(run.config, {"precision": precision, **of_protocol, **named})
    if config.guidance_class not in (None, AS_IMAGE, 0, 1) and class_scale(recipe.sample) == 0:
        raise UserError(
            f"--guidance-class {config.guidance_class} has no effect with --guidance 1, without which neither is "
            "guided; give a scale above 1, or leave it out"
        )
    if protocol and protocol.guidance_by == WEAKER and recipe.sample.guidance > 1 and config.weaker is None:
        raise UserError(
            f"--protocol {protocol.name} guides away from a weaker model; pass --weaker RUN, or take "
            f"--protocol {protocol.name}-unguided"
        )
    return with_shifts(recipe, run.geometry.channels * run.geometry.input_size**2)


def _settings(
    config: GenerateConfig, recipe: TrainConfig, checkpoint: Path, decoder: str, n_classes: int, device: torch.device
) -> dict[str, Any]:
    """All that determines an image besides its number, as JSON has it."""
    return {
        "version": VERSION,
        "step": step_of(checkpoint),
        "weights_sha256": _sha256(checkpoint),
        "decoder": decoder,
        "labels": config.labels,
        "classes": n_classes,
        "seed": config.seed,
        "batch": config.batch,
        "arithmetic": f"{recipe.precision} on {device.type}",
        "rounding": config.rounding,
        **{n: value for n, value in flatten(recipe).items() if n.startswith("sample.") and n != "sample.labels"},
        "sample.guidance_class": recipe.class_guidance,
    }


def _sha256(checkpoint: Path) -> str:
    """Of the averaged weights."""
    with open(checkpoint / EMA_WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(recipe: TrainConfig, config: GenerateConfig, step: int) -> str:
    sampler = recipe.sample
    guidance = f"guidance{sampler.guidance:g}"
    of_class = class_scale(sampler) if recipe.model.class_token else sampler.guidance
    if of_class != sampler.guidance and (sampler.guidance > 1 or of_class not in (0, 1)):
        guidance += f"-class{of_class:g}"
    if config.weaker is not None:
        guidance += "-weaker"
    if config.rounding != "round":
        guidance += f"-{config.rounding}"
    if config.class_noise is not None:
        guidance += f"-class-noise-{config.class_noise}"
    name = f"{step:07d}-{sampler.sampler}{sampler.steps}-{guidance}-seed{config.seed}"
    name += f"-{config.labels}" if config.labels != "balanced" else ""
    name += f"-{config.protocol}" if config.protocol else ""
    named = {each: getattr(config, each) for each in IN_NAME}
    return name + "".join(f"-{each.replace('_', '-')}{value}" for each, value in named.items() if value is not None)


def _earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What the images that are there were drawn by; None where there are none.

    Raises UserError when the folder holds images of other settings, or files of something else. Settings under which
    nothing was drawn bind nobody: a mistyped --vae would keep its folder for good.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder} holds files that are not of this command; name another --out")
        return None
    if not n_written(folder):
        return None
    drawn_by = parse_json(dict[str, Any], read_regular(path), str(path), "name another --out")
    # A setting that is younger than the images was as its declaration says of before.
    before = {name: item.metadata["before"] for name, _, item in leaves(TrainConfig()) if name in settings}
    before |= {"rounding": "round"} | drawn_by
    names = sorted({*before, *settings} - {NOTED})
    differing = [
        f"{shown(n)}: were {shown(str(before.get(n)))[:LONGEST]}, are {settings.get(n)}"
        for n in names
        if before.get(n) != settings.get(n)
    ]
    if differing:
        raise UserError(f"{folder} holds images of other settings ({'; '.join(differing)}); name another --out")
    return drawn_by
