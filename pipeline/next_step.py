"""The command that trains on a store: a preset, and options where the store leaves a choice, that the trainer takes.

What fits is arithmetic of identities: a model of patch p makes (side / p)² tokens of latents with `side` pixels, which
must be the features' grid; without features, p makes as many tokens as features would have, or nearly.

    sit-xl-{2,4,8}[-512][-vanilla]   at 256 or 512 px
    sit-xl-2-reg                     at 256 px, where class tokens lie beside the patch tokens
    sit-xl-1[-vanilla]               for latents of autoencoders of factor 16 and more
    sit-tiny-2                       at any other resolution
    rit-xl-1                         of a store without latents, whose features are learned as such
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping
from contextlib import closing, suppress
from typing import Any

from storage import GroupReader, StoreError, open_store
from storage.base.ending import command as command_line
from storage.base.programs import is_script
from storage.identity import FeaturesIdentity, LatentsIdentity

PATCHES = (1, 2, 4, 8)
PIXELS_A_TOKEN = 16  # of features, and so of published models
TINY, TINY_PATCH = "sit-tiny-2", 2
OF_FEATURES, OF_FEATURES_WIDTH, OF_FEATURES_RESOLUTION = "rit-xl-1", 1152, 256  # wider tokens are not proposed


def train_commands(where: str, preferred: Collection[str] = ()) -> list[str]:
    """`make train STORE=… PRESET=…` and what it needs first, to be pasted into a shell; none where no model can train.

    Of an installed script, beside which there may be no Makefile, it is `repa-trainer train --store …`.
    Of several groups the `preferred` ones are named, where they fit; those that are not complete never are.
    """
    store = open_store(where)
    paths = store.groups()
    groups: dict[str, GroupReader[Any]] = {}
    for path in sorted(paths, key=lambda path: path not in preferred):
        with suppress(StoreError), closing(store.group(path)) as group:
            groups[path] = group
    n_without = int((store.classes.labels < 0).sum())
    # samples of which only some have a label can only be trained on without any
    unlabelled = ["--loss.label-dropout 1"] * (0 < n_without < store.n_rows)
    if not any(path.startswith("latents/") for path in paths):
        return _on_features(where, store.resolution, groups, unlabelled)
    latents = [path for path in groups if path.startswith("latents/")]
    features = [path for path in groups if path.startswith("features/")]
    fitting = [
        (source, target, patch)
        for source in latents
        for target in [*features, ""]  # none: a vanilla model
        for patch in sorted(PATCHES, key=lambda patch: _distance(groups[source], patch, store.resolution))
        if _fits(groups[source], groups.get(target), patch)
    ]
    if not fitting:
        return []
    source, target, patch = min(fitting, key=lambda fit: not fit[1])  # the first with alignment, else the first
    preset, options = _preset(store.resolution, patch, groups.get(target))
    options += unlabelled
    for kind, chosen in (("latents", source), ("features", target)):
        if chosen and sum(path.startswith(f"{kind}/") for path in paths) > 1:
            options.append(f"--data.{kind} {shlex.quote(chosen.partition('/')[2])}")
    return [_train(where, preset, options)]


def _train(where: str, preset: str, options: list[str]) -> str:
    """By the Makefile, or where this is an installed script, and there may be none, by the trainer's own command."""
    if is_script():
        return " ".join([command_line("trainer", "train", "--store", where, "--preset", preset), *options])
    line = f"make train STORE={shlex.quote(where)} PRESET={preset}"
    return f"{line} ARGS={shlex.quote(' '.join(options))}" if options else line


def _on_features(
    where: str, resolution: int, groups: Mapping[str, GroupReader[Any]], unlabelled: list[str]
) -> list[str]:
    """Statistics by place, then a model of the first features that such a model can learn."""
    for path, group in groups.items():
        height, width = group.identity.token_grid or (0, 1)
        if not (
            "patches" in group.arrays and height == width and (group.identity.width or math.inf) <= OF_FEATURES_WIDTH
        ):
            continue
        if not _stands_for_itself(group):
            continue
        options = [f"--data.latents {shlex.quote(path)}"]
        options += ["--data.resolution 0"] * (resolution != OF_FEATURES_RESOLUTION)
        options += ["--model.class-token false"] * ("cls" not in group.arrays)
        statistics = command_line("storage", "statistics", where, path, "--places")
        return [statistics, _train(where, OF_FEATURES, options + unlabelled)]
    return []


def _stands_for_itself(group: GroupReader[Any]) -> bool:
    """Whether a run may take decoded tokens as latents; it looks at them itself, and may refuse what is uneven."""
    try:
        return group.codec.exact
    except StoreError:  # a codec of newer code
        return False


def _preset(resolution: int, patch: int, target: GroupReader[FeaturesIdentity] | None) -> tuple[str, list[str]]:
    """A preset's name, and the options that make it fit."""
    vanilla = "" if target is not None else "-vanilla"
    if resolution not in (256, 512):
        options = [f"--model.patch {patch}"] * (patch != TINY_PATCH)
        return TINY, options + ["--loss.projection-weight 0"] * bool(vanilla)
    if patch == 1:
        return f"sit-xl-1{vanilla}", ["--data.resolution 512"] * (resolution == 512)
    if resolution == 512:
        return f"sit-xl-{patch}-512{vanilla}", []
    if patch == 2 and target is not None and "cls" in target.arrays:
        return "sit-xl-2-reg", []
    return f"sit-xl-{patch}{vanilla}", []


def _distance(latents: GroupReader[LatentsIdentity], patch: int, resolution: int) -> float:
    """How far, in powers of two, a patch's number of tokens is from that of published models."""
    return abs(math.log2(latents.identity.latent_size[0] / patch * PIXELS_A_TOKEN / resolution))


def _fits(latents: GroupReader[LatentsIdentity], features: GroupReader[FeaturesIdentity] | None, patch: int) -> bool:
    height, width = latents.identity.latent_size
    if height != width or height % patch:
        return False
    return features is None or (
        "patches" in features.arrays and features.identity.token_grid == (height // patch, height // patch)
    )
