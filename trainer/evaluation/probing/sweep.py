"""Probing and alignment of a run's hidden states over blocks × times × checkpoints, against a store's features.

Latents, features and labels are those of the same rows of one store: the one the run was trained on, or another that
was made with the same VAE (a validation set, say). Hidden states of one checkpoint and time serve every measure, and no
encoder is loaded: what it said is in the store.

Cost: a forward pass of n images a checkpoint and time; per block a probe (see `probe.py`) and a search for neighbours
(n² · width multiplications). Memory: see `hidden_states.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from storage import GroupReader, Store, open_store
from storage.base.console import progress_bar
from storage.base.errors import UserError
from storage.base.waiting import waiting
from storage.codecs import TOKENS
from storage.identity import unlike
from storage.order import ValidRows
from storage.torch.codecs import twin_of
from trainer.data.groups import pick_group
from trainer.evaluation.options import SweepConfig
from trainer.evaluation.probing import cknna
from trainer.evaluation.probing.hidden_states import pooled_hidden_states, read_rows
from trainer.evaluation.probing.probe import probe
from trainer.ranks.world import device_named
from trainer.run.opened import OpenRun, checkpoints_of, load_model, open_run, step_of

Measure = Literal["probe", "cknna"]
FEATURE_FIELDS = ("encoder", "weights_sha256", "resolution", "layer", "token_grid", "width")
LATENT_FIELDS = (
    "encoder",
    "weights_sha256",
    "resolution",
    "latent_channels",
    "latent_size",
    "latent_scale_factor",
    "latent_shift_factor",
    "latent_normalisation",
)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The rows that are measured, from one store."""

    store: Store
    latents: GroupReader
    features: GroupReader
    rows: np.ndarray  # int64, sorted
    labels: Tensor  # int64, −1 where the store has none
    class_tokens: GroupReader | None = None  # the features whose class tokens the run's model denoises

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of which samples they are: the store's index, and the rows in it."""
        index = str(self.store.attributes["index_digest"])
        return hashlib.sha256(index.encode() + np.asarray(self.rows, dtype="<i8").tobytes()).hexdigest()

    def close(self) -> None:
        """Close every file."""
        for group in (self.latents, self.features, self.class_tokens):
            if group is not None:
                group.close()


def sweep(path: Path, config: SweepConfig, measures: Collection[Measure]) -> dict[str, Any]:
    """Measure the run at `path`; returns what was measured, and of what, as JSON has it. Raises UserError."""
    with waiting("opening the run and its store"):
        run = open_run(path)
    try:
        with waiting("opening the run and its store"):
            samples = open_samples(run, config)
        try:
            return _sweep(run, samples, config, measures)
        finally:
            samples.close()
    finally:
        run.data.close()


def _sweep(run: OpenRun, samples: Samples, config: SweepConfig, measures: Collection[Measure]) -> dict[str, Any]:
    device = device_named(config.device)
    run.scale  # noqa: B018 - is there, or says so before anything is measured
    if "probe" in measures and (samples.labels < 0).any():
        raise UserError(f"{samples.store.root} has samples without a label; a probe needs one for each, `cknna` none")
    blocks = parse_blocks(config.blocks, run.geometry.depth + run.geometry.head_depth)
    checkpoints = checkpoints_of(run.path, config.checkpoints)
    labels = samples.labels.to(device)
    n = len(samples.rows)
    points = []
    parameters = 0
    passes = len(checkpoints) * len(config.times)
    with progress_bar((passes + 1) * n, unit="img", description=f"{run.path.name}: {' and '.join(measures)}") as bar:
        targets = pooled_features(samples.features, samples.rows, config.batch, device, bar.update)
        target_neighbours, of_features = None, {}
        if "cknna" in measures:
            bar.set_postfix_str(f"neighbours of {samples.features.path}")
            target_neighbours = cknna.nearest(targets, config.k)
        if "probe" in measures:
            bar.set_postfix_str(f"fitting a probe of {samples.features.path}")
            of_features = {"probe": probe(targets, labels, config.c).accuracy}
        for checkpoint in checkpoints:
            bar.set_postfix_str(f"loading step {step_of(checkpoint)}")
            model = load_model(run, checkpoint, config.weights, device)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            for t in config.times:
                bar.set_postfix_str(f"step {step_of(checkpoint)}, t = {t:g}")
                states = pooled_hidden_states(
                    model,
                    run,
                    samples.latents,
                    samples.rows,
                    t,
                    blocks,
                    seed=config.seed,
                    batch=config.batch,
                    device=device,
                    class_tokens=samples.class_tokens,
                    progress=bar.update,
                )
                for i, (block, x) in enumerate(states.items(), 1):
                    bar.set_postfix_str(f"step {step_of(checkpoint)}, t = {t:g}: measuring {i} of {len(states)} blocks")
                    point: dict[str, Any] = {"step": step_of(checkpoint), "t": t, "block": block}
                    if "probe" in measures:
                        result = probe(x, labels, config.c)
                        point |= {"probe": result.accuracy, "probe_train": result.train_accuracy}
                    if target_neighbours is not None:
                        point["cknna"] = cknna.alignment(cknna.nearest(x, config.k), target_neighbours)
                    points.append(point)
                bar.set_postfix_str("")
    return {
        "run": str(run.path.absolute()),
        "name": run.path.name,
        "preset": run.config.preset,
        "parameters": parameters,
        "depth": run.geometry.depth,
        "aligned_blocks": [target.block for target in run.config.targets],
        "store": str(samples.store.root),
        "features": {
            "path": samples.features.path,
            "identity_digest": samples.features.identity_digest,
            **of_features,
        },
        "rows": samples.digest,
        "n": n,
        "k": config.k,
        "c": config.c,
        "weights": config.weights,
        "seed": config.seed,
        "points": points,
    }


def open_samples(run: OpenRun, config: SweepConfig) -> Samples:
    """Open what is measured against, and choose the rows. Raises UserError when it does not fit the run."""
    store = open_store(config.store) if config.store else run.data.store
    mine = run.data.latents
    latents = store.group(pick_group(store, "latents", mine.path.removeprefix("latents/")))
    fields, encoder = (FEATURE_FIELDS, "encoder") if run.data.of_features else (LATENT_FIELDS, "VAE")
    if differing := unlike(mine.identity, latents.identity, fields):
        raise UserError(
            f"{store.root} has other latents than {run.path} was trained on ({differing}); precompute it with the "
            f"same {encoder}"
        )
    name = config.features.removeprefix("features/")
    if not name and run.data.features:
        name = run.data.features[0].path.partition("/")[2]
    elif not name and run.data.of_features:
        name = mine.path.partition("/")[2]
    features = store.group(_features_path(store, name))
    if TOKENS not in features.arrays:
        raise UserError(
            f"{features.path} of {store.root} holds {', '.join(features.arrays)} and no patch tokens, whose mean is "
            "compared; choose other --features"
        )
    of_class = run.data.class_tokens
    class_tokens = store.group(of_class.path) if of_class is not None else None
    if class_tokens is not None:
        class_tokens.require("width", arrays=["cls"])
    groups = [group for group in (latents, features, class_tokens) if group is not None]
    valid = ValidRows(store.n_rows, np.concatenate([group.failed_rows for group in groups]))
    chosen = np.random.default_rng(config.seed).permutation(len(valid))[: config.n]
    rows = np.sort(valid.rows(chosen))
    labels = torch.from_numpy(store.classes.labels[rows].astype(np.int64))
    return Samples(store=store, latents=latents, features=features, rows=rows, labels=labels, class_tokens=class_tokens)


def _features_path(store: Store, name: str) -> str:
    if name:
        return f"features/{name}"
    names = [path.partition("/")[2] for path in store.groups() if path.startswith("features/")]
    if len(names) != 1:
        which = (
            f"has several features ({', '.join(names)}); choose with --features NAME" if names else "has no features"
        )
        raise UserError(f"store {store.root} {which}")
    return f"features/{names[0]}"


def pooled_features(
    features: GroupReader,
    rows: np.ndarray,
    batch: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Stored patch tokens averaged over patches, float32 (len(rows), D) on `device`."""
    twin = twin_of(features.codec)
    pooled = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        arrays = {name: read_rows(features, name, part).to(device) for name in features.codec_arrays}
        tokens = twin.decode(arrays, torch.from_numpy(part).to(device), 0)
        pooled.append(tokens.values.float().mean(dim=1) if tokens.mean is None else tokens.mean)
        progress(len(part))
    return torch.cat(pooled)


def parse_blocks(text: str, depth: int) -> list[int]:
    """`all`, or numbers from 1 separated by commas. Raises UserError."""
    if text == "all":
        return list(range(1, depth + 1))
    blocks = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= block <= depth for block in blocks):
        raise UserError(f"--blocks must be `all` or numbers from 1 to {depth} separated by commas, got {text!r}")
    return sorted(set(blocks))
