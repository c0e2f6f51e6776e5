"""The command that trains on a store: a preset, and options where the store leaves a choice, that the trainer takes.

What fits is arithmetic of identities: a model of patch p makes (side / p)² tokens of latents with `side` pixels, which
must be the features' grid. Presets `sit-xl-{2,4,8}` are of 256 px, those with `-512` of 512 px, `sit-tiny-2` of any.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from contextlib import closing, suppress
from typing import Any

from storage import GroupReader, StoreError, open_store
from storage.identity import FeaturesIdentity, LatentsIdentity

PATCHES = (2, 4, 8)
PUBLISHED = {256: "", 512: "-512"}  # pixels → what ends a preset's name
TINY, TINY_PATCH = "sit-tiny-2", 2


def train_command(where: str, preferred: Collection[str] = ()) -> str:
    """`make train STORE=… PRESET=…`, to be pasted into a shell; empty where no model can be trained on the store.

    Of several groups the `preferred` ones are named, where they fit; those that are not complete never are.
    """
    store = open_store(where)
    there = store.groups()
    groups: dict[str, GroupReader[Any]] = {}
    for path in sorted(there, key=lambda path: path not in preferred):
        with suppress(StoreError), closing(store.group(path)) as group:
            groups[path] = group
    latents = [path for path in groups if path.startswith("latents/")]
    features = [path for path in groups if path.startswith("features/")]
    fitting = [
        (source, target, patch)
        for source in latents
        for target in [*features, ""]  # none: a vanilla model
        for patch in PATCHES
        if _fits(groups[source], groups.get(target), patch)
    ]
    if not fitting:
        return ""
    source, target, patch = min(fitting, key=lambda fit: not fit[1])  # the first with alignment, else the first
    options = []
    if store.resolution in PUBLISHED:
        preset = f"sit-xl-{patch}{PUBLISHED[store.resolution]}{'' if target else '-vanilla'}"
    else:
        preset = TINY
        options += [f"--model.patch {patch}"] * (patch != TINY_PATCH) + ["--loss.projection-weight 0"] * (not target)
    for kind, chosen in (("latents", source), ("features", target)):
        if chosen and sum(path.startswith(f"{kind}/") for path in there) > 1:
            options.append(f"--data.{kind} {shlex.quote(chosen.partition('/')[2])}")
    line = f"make train STORE={shlex.quote(where)} PRESET={preset}"
    return f"{line} ARGS={shlex.quote(' '.join(options))}" if options else line


def _fits(latents: GroupReader[LatentsIdentity], features: GroupReader[FeaturesIdentity] | None, patch: int) -> bool:
    height, width = latents.identity.latent_size
    if height != width or height % patch:
        return False
    return features is None or (
        "patches" in features.arrays and features.identity.token_grid == (height // patch, height // patch)
    )
