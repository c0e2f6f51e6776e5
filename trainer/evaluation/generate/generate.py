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
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from storage.base.console import progress_bar
from storage.base.errors import UserError
from storage.base.files import write_atomic
from storage.base.waiting import waiting
from trainer.config.schema import TrainConfig
from trainer.evaluation.generate.decode import (
    Rounding,
    decode_latents,
    decoder_sha256,
    load_decoder,
    to_decode,
    write_grid,
)
from trainer.evaluation.generate.draw import draw_latents, in_words, labels_of
from trainer.evaluation.generate.image_files import (
    LABELS_FILE,
    NOTED,
    SETTINGS_FILE,
    image_path,
    is_whole,
    n_written,
    pack_npz,
    read_image,
    write_image,
)
from trainer.evaluation.generate.plan import Plan, plan
from trainer.evaluation.options import GenerateConfig
from trainer.ranks.arithmetic import set_arithmetic
from trainer.ranks.world import World, world_of_ranks
from trainer.run.averages import held_of_first
from trainer.run.lock import only_writer
from trainer.run.opened import OpenRun, load_model

VERSION = 1
GRID_IMAGES = 64


def generate(config: GenerateConfig) -> list[Path]:
    """Draw what is missing and return the paths of the folder, the grid and the `.npz`. Raises UserError."""
    with world_of_ranks(config.device) as world:
        with waiting("opening the run, reading its checkpoint", hidden=not world.is_main):
            planned = plan(config, world.device)
        config, recipe, settings, folder = planned.config, planned.recipe, planned.settings, planned.folder
        if world.is_main:
            away = f", away from {planned.weaker.run.path}" if planned.weaker else ""
            print(f"images by {in_words(recipe)}{away}", file=sys.stderr)  # stdout has what came of it
            if young := held_of_first(recipe.ema_decay, settings["step"]):
                print(f"averaged weights: {young}", file=sys.stderr)
        with only_writer(folder, world, "generating"):
            if world.is_main:
                for stray in folder.glob(".*.partial"):  # of a process that was killed as it wrote
                    stray.unlink()
                write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=1).encode(), "generate")
            world.any(False)  # nobody looks for what is missing while others already write
            with waiting("looking which images are there", hidden=not world.is_main):
                missing = [i for i in range(config.n) if not is_whole(image_path(folder, i))]
            world.any(False)
            if missing:
                _set_arithmetic(recipe, world.device)
                with waiting("loading the model and its decoder", hidden=not world.is_main):
                    source = _source(planned, world.device)
                if world.is_main and settings[NOTED]["decoder_sha256"] is None and not n_written(folder):
                    settings[NOTED]["decoder_sha256"] = decoder_sha256(planned.decoder)  # it may have been fetched now
                    write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=1).encode(), "generate")
                world.any(False)
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
    def pictures(
        self,
        images: Tensor,
        on_call: Callable[[int], None] | None = None,
        on_decoded: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of their numbers int64 (B,); `on_call` as `draw_latents` says, `on_decoded` as
        `decode_latents` does.
        """
        labels = labels_of(images, self.run.geometry.n_classes, self.config.labels, self.config.seed)
        latents = draw_latents(
            self.model, images, labels, self.run.geometry, self.recipe, self.config.seed, self.weaker, on_call
        )
        if not latents.isfinite().all():
            raise UserError(
                f"the model of {self.run.path} gives NaN or infinity for images {images[0]} to {images[-1]}; generate "
                "from an earlier --checkpoint, or with another --precision"
            )
        rounding: Rounding = self.config.rounding or "round"
        stored = to_decode(latents, self.run.scale, self.run.data)
        return decode_latents(stored, self.decoder, rounding, on_decoded)


def _source(planned: Plan, device: torch.device) -> _Source:
    """Loads the models."""
    run, weaker = planned.run, planned.weaker
    return _Source(
        model=load_model(run, planned.checkpoint, "ema", device),
        weaker=load_model(weaker.run, weaker.checkpoint, "ema", device) if weaker else None,
        decoder=load_decoder(planned.decoder, device, of=run.data),
        run=run,
        recipe=planned.recipe,
        config=planned.config,
    )


def _draw(source: _Source, folder: Path, missing: Sequence[int], world: World) -> None:
    """This rank's part of the blocks in which an image is missing."""
    config = source.config
    wanted = set(missing)
    blocks = sorted({i // config.batch for i in missing})
    bar = progress_bar(
        config.n, unit="img", done=config.n - len(missing), description="generate", hidden=not world.is_main
    )

    def show_call(n_calls: int) -> None:
        bar.set_postfix_str(f"{n_calls} calls of the model in this batch", refresh=False)
        bar.update(0)  # shows it, if it is time to

    def show_decoded(n: int) -> None:
        bar.set_postfix_str(f"decoding, {n} of {config.batch} images of this batch", refresh=False)
        bar.update(0)

    with bar:
        for block in blocks[world.rank :: world.size]:
            numbers = range(block * config.batch, (block + 1) * config.batch)
            pictures = source.pictures(
                torch.arange(numbers.start, numbers.stop, device=world.device), show_call, show_decoded
            )
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
    with progress_bar(config.n, unit="img", description=f"pack {packed.name}") as bar:
        pack_npz(paths, labels, packed, bar.update)
    return [folder, picture, packed]


def _set_arithmetic(recipe: TrainConfig, device: torch.device) -> None:
    set_arithmetic(dataclasses.replace(recipe, deterministic=False))
    if device.type == "cpu":
        torch.set_num_threads(1)
