"""`python -m trainer generate`: images of a run's averaged weights, the same files however the work was split.

    RUN/samples-STEP-…/000000.png …   the images; settings.json, what determines them; labels.txt, their classes
    RUN/samples-….png                 a grid of the first ones
    RUN/samples-….npz                 with --format npz: all of them, in ADM's layout

Image i is a function of the settings and of i: its noise and its label are keyed by (seed, i), and it is computed in
the block of images that holds it, [kB, (k+1)B), never in another batch, since a matrix product may round otherwise in a
batch of another size. Ranks take the blocks in turn. On a CPU a process computes with one thread, for the same reason;
more processes (GPUS=2, which on a machine without GPUs counts processes) use more cores. Classes are the model's: those
of a public checkpoint may be more than its store's.

Images that are there and whole are not drawn again, so a run that was killed goes on, and a larger N only adds to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.base.boundary import parse_json, read_regular
from storage.base.console import progress_bar
from storage.base.errors import UserError
from storage.base.files import write_atomic
from storage.base.shown import LONGEST, shown
from trainer.config.sample import AS_IMAGE
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, leaves, override
from trainer.evaluation.generate.decode import decode_latents, decoder_of, load_decoder, to_decode, write_grid
from trainer.evaluation.generate.draw import draw_latents, in_words
from trainer.evaluation.generate.image_files import (
    LABELS_FILE,
    SETTINGS_FILE,
    image_path,
    is_whole,
    n_written,
    pack_npz,
    read_image,
    write_image,
)
from trainer.evaluation.options import GenerateConfig, LabelsDrawn
from trainer.loop import random_keys
from trainer.objectives import OBJECTIVES
from trainer.ranks.arithmetic import set_arithmetic
from trainer.ranks.world import World, world_of_ranks
from trainer.run.checkpoint import EMA_WEIGHTS
from trainer.run.folder import RunFolder
from trainer.run.lock import only_writer
from trainer.run.opened import OpenRun, checkpoints_of, load_model, open_run, step_of

VERSION = 1
GRID_IMAGES = 64


def generate(config: GenerateConfig) -> list[Path]:
    """Draw what is missing and return the paths of the folder, the grid and the `.npz`. Raises UserError."""
    with world_of_ranks(config.device) as world:
        run = open_run(config.run)
        run.data.close()  # only what it says is needed, not its rows
        checkpoint = _one_checkpoint(config)
        recipe = _recipe(run.config, config, world.device)
        config = dataclasses.replace(config, labels=recipe.sample.labels)
        decoder = config.vae or decoder_of(run.data, run.config)
        if not decoder:
            what = (
                "a folder or hub id of diffusers' AutoencoderRAE" if run.data.of_features else "a diffusers directory"
            )
            raise UserError(f"{run.data.latents.path} does not say what decodes it; pass --vae with {what}")
        weaker = _weaker(config.weaker, run, recipe) if config.weaker is not None else None
        if not run.geometry.n_classes and recipe.sample.guidance > 1 and weaker is None:
            raise UserError(
                f"{config.run} was trained without labels, so there is no class to guide towards; leave --guidance at "
                f"1, got {recipe.sample.guidance:g}"
            )
        settings = _settings(config, recipe, checkpoint, decoder, run.geometry.n_classes, world.device)
        if weaker is not None:
            settings["weaker_sha256"] = _sha256(weaker.checkpoint)
        folder = config.out or RunFolder(config.run).drawn(_name(recipe, config, step_of(checkpoint)))
        _refuse_other_settings(folder, settings)
        if world.is_main:
            print(f"images by {in_words(recipe)}", file=sys.stderr)  # stdout has the paths
        with only_writer(folder, world, "generating"):
            if world.is_main:
                for stray in folder.glob(".*.partial"):  # of a process that was killed as it wrote
                    stray.unlink()
                write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=1).encode(), "generate")
            world.any(False)  # nobody looks for what is missing while others already write
            missing = [i for i in range(config.n) if not is_whole(image_path(folder, i))]
            world.any(False)
            if missing:
                _set_arithmetic(recipe, world.device)
                source = _Source(
                    model=load_model(run, checkpoint, "ema", world.device),
                    weaker=load_model(weaker.run, weaker.checkpoint, "ema", world.device) if weaker else None,
                    decoder=load_decoder(decoder, world.device, of=run.data),
                    run=run,
                    recipe=recipe,
                    config=config,
                )
                _draw(source, folder, missing, world)
            world.any(False)
            return _finish(config, folder, settings["classes"]) if world.is_main else []


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What images come from."""

    model: nn.Module
    weaker: nn.Module | None
    decoder: nn.Module
    run: OpenRun
    recipe: TrainConfig
    config: GenerateConfig

    @torch.inference_mode()
    def pictures(self, images: Tensor) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of their numbers int64 (B,)."""
        labels = labels_of(images, self.run.geometry.n_classes, self.config.labels, self.config.seed)
        latents = draw_latents(
            self.model, images, labels, self.run.geometry, self.recipe, self.config.seed, self.weaker
        )
        if not latents.isfinite().all():
            raise UserError(
                f"the model of {self.run.path} gives NaN or infinity for images {images[0]} to {images[-1]}; generate "
                "from an earlier --checkpoint, or with another --precision"
            )
        return decode_latents(to_decode(latents, self.run.scale, self.run.data), self.decoder)


def labels_of(images: Tensor, n_classes: int, labels: LabelsDrawn | None, seed: int) -> Tensor:
    """Classes int64 (B,) of image numbers: in turn (balanced), or each drawn on its own (random).

    A model without classes has the null label alone, 0.
    """
    if n_classes == 0:
        return torch.zeros_like(images)
    if labels == "balanced":
        return images % n_classes
    return (random_keys.uniform(seed, "label", 0, images).double() * n_classes).long()


def _draw(source: _Source, folder: Path, missing: Sequence[int], world: World) -> None:
    """This rank's part of the blocks in which an image is missing."""
    config = source.config
    wanted = set(missing)
    blocks = sorted({i // config.batch for i in missing})
    bar = progress_bar(
        config.n, unit="img", done=config.n - len(missing), description="generate", hidden=not world.is_main
    )
    with bar:
        for block in blocks[world.rank :: world.size]:
            numbers = range(block * config.batch, (block + 1) * config.batch)
            pictures = source.pictures(torch.arange(numbers.start, numbers.stop, device=world.device))
            for i, pixels in zip(numbers, pictures, strict=True):
                if i in wanted:
                    write_image(image_path(folder, i), pixels)
            if world.is_main:
                bar.update(min(config.n, n_written(folder)) - bar.n)
        world.any(False)  # the bar is of all ranks' images
        bar.update(config.n - bar.n)


def _finish(config: GenerateConfig, folder: Path, n_classes: int) -> list[Path]:
    """Write what is made of all images."""
    labels = labels_of(torch.arange(config.n), n_classes, config.labels, config.seed).numpy() if n_classes else None
    if labels is not None:
        write_atomic(folder / LABELS_FILE, "".join(f"{label}\n" for label in labels).encode(), "generate")
    paths = [image_path(folder, i) for i in range(config.n)]
    picture = folder.with_name(f"{folder.name}.png")
    write_grid(np.stack([read_image(path) for path in paths[:GRID_IMAGES]]), picture)
    if config.format == "png":
        return [folder, picture]
    packed = folder.with_name(f"{folder.name}.npz")
    pack_npz(paths, labels, packed)
    return [folder, picture, packed]


def _one_checkpoint(config: GenerateConfig) -> Path:
    chosen = checkpoints_of(config.run, config.checkpoint)
    if len(chosen) > 1:
        raise UserError(f"--checkpoint {config.checkpoint} names {len(chosen)} checkpoints; images are of one")
    return chosen[0]


@dataclass(frozen=True, kw_only=True)
class _Weaker:
    """A run that guidance leads away from."""

    run: OpenRun
    checkpoint: Path


def _weaker(path: Path, run: OpenRun, recipe: TrainConfig) -> _Weaker:
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
    ):
        if a != b:
            raise UserError(f"--weaker {path} has {what} {b}, {run.path} has {a}; name a run like it")
    if OBJECTIVES[ours.kind] is not OBJECTIVES[theirs.kind]:
        raise UserError(
            f"--weaker {path} is of --model.kind {theirs.kind}, whose outputs are not those of {ours.kind}; name a run "
            "like it"
        )
    return _Weaker(run=weaker, checkpoint=checkpoints_of(path)[0])


def _recipe(of_run: TrainConfig, config: GenerateConfig, device: torch.device) -> TrainConfig:
    """The run's configuration with the sampler and precision that are asked for."""
    precision = config.precision
    if precision == "auto":  # the published figures were sampled in float32 with TF32 matrix products
        precision = "tf32" if device.type == "cuda" else "fp32"
    names = ("sampler", "steps", "guidance", "guidance_class", "class_noise", "labels")
    asked = {f"sample.{name}": getattr(config, name) for name in names}
    if config.guidance is not None and config.guidance_class is None:  # whatever number the run was saved with
        asked["sample.guidance_class"] = AS_IMAGE
    if config.guidance_class is not None and not of_run.model.class_token:
        raise UserError(f"--guidance-class {config.guidance_class:g} is of a class token; {config.run} has none")
    return override(of_run, {"precision": precision, **{k: v for k, v in asked.items() if v is not None}})


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
    if recipe.model.class_token and sampler.class_guidance != sampler.guidance > 1:
        guidance += f"-class{sampler.class_guidance:g}"
    if config.weaker is not None:
        guidance += "-weaker"
    if config.class_noise is not None:
        guidance += f"-class-noise-{config.class_noise}"
    name = f"{step:07d}-{sampler.sampler}{sampler.steps}-{guidance}-seed{config.seed}"
    return f"{name}-{config.labels}" if config.labels != "balanced" else name


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError when the folder holds images of other settings, or files of something else.

    Settings under which nothing was drawn bind nobody: a mistyped --vae would keep its folder for good.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder} holds files that are not of this command; name another --out")
        return
    if not n_written(folder):
        return
    drawn_by = parse_json(dict[str, Any], read_regular(path), str(path), "name another --out")
    # A setting that is younger than the images was as its declaration says of before.
    before = {name: item.metadata["before"] for name, _, item in leaves(TrainConfig()) if name in settings} | drawn_by
    names = sorted({*before, *settings})
    differing = [
        f"{shown(n)}: were {shown(str(before.get(n)))[:LONGEST]}, are {settings.get(n)}"
        for n in names
        if before.get(n) != settings.get(n)
    ]
    if differing:
        raise UserError(f"{folder} holds images of other settings ({'; '.join(differing)}); name another --out")


def _set_arithmetic(recipe: TrainConfig, device: torch.device) -> None:
    set_arithmetic(dataclasses.replace(recipe, deterministic=False))
    if device.type == "cpu":
        torch.set_num_threads(1)
