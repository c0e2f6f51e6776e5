"""What a run reads: the groups of the store that its configuration names, checked against each other and the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import CacheConfig, GroupReader, Store, UserError, open_store
from storage.codec import Int8Codec, codec_of
from storage.shard_files import raise_open_file_limit
from trainer.config import TrainConfig
from trainer.models.sit import SiTConfig


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Open readers and what they fit. `valid_rows` is None when no sample failed, so that memory stays constant."""

    store: Store
    latents: GroupReader
    features: GroupReader | None
    labels: np.ndarray  # int64 (N,)
    class_names: list[str]
    valid_rows: np.ndarray | None  # int64, sorted
    codec: Int8Codec | None  # of the features' patches; None: plain float16

    @property
    def n_samples(self) -> int:
        """Samples that can be trained on."""
        return self.store.n_rows if self.valid_rows is None else len(self.valid_rows)

    @property
    def identities(self) -> dict[str, str]:
        """Group path → identity digest of what is read."""
        return {group.path: group.identity_digest for group in (self.latents, self.features) if group is not None}

    def close(self) -> None:
        """Close every file."""
        for group in (self.latents, self.features):
            if group is not None:
                group.close()


def open_data(config: TrainConfig) -> TrainingData:
    """Open the store's groups that the configuration needs.

    Raises StoreError or UserError, in one line, when the store, a group or a label is missing or does not fit.
    """
    if not config.store:
        raise UserError("no store was named; pass --store ROOT (make train STORE=ROOT)")
    store = open_store(config.store)
    raise_open_file_limit()
    paths = [pick_group(store, "latents", config.data.latents)]
    if config.aligns:
        paths.append(pick_group(store, "features", config.data.features))
    threads = config.data.threads or None
    caches = _share_cache(config, store, paths)
    latents, *others = (store.group(path, n_threads=threads, cache=caches.get(path)) for path in paths)
    features = others[0] if others else None
    failed = np.unique(np.concatenate([group.failed_rows for group in (latents, features) if group is not None]))
    if len(failed) and config.data.failed_rows == "refuse":
        raise UserError(
            f"{len(failed)} samples of {store.root} could not be decoded (first row {failed[0]}); mend and precompute "
            "them, or pass --data.failed-rows leave-out"
        )
    valid = np.setdiff1d(np.arange(store.n_rows), failed) if len(failed) else None
    labels = store.classes.labels
    if labels.min() < 0:
        raise UserError(f"{store.root} has samples without a label; class-conditional training needs one for each")
    return TrainingData(
        store=store,
        latents=latents,
        features=features,
        labels=labels,
        class_names=store.classes.class_names,
        valid_rows=valid,
        codec=codec_of(features.identity) if features is not None else None,
    )


def _share_cache(config: TrainConfig, store: Store, paths: list[str]) -> dict[str, CacheConfig]:
    """The cache's gigabytes shared out so that the same rows of every group fit."""
    if not config.data.cache_gb:
        return {}
    sample_bytes = {path: store.group_layout(path)[0].sample_bytes for path in paths}
    budget = config.data.cache_gb * 1e9 / sum(sample_bytes.values())
    return {
        path: CacheConfig(directory=config.data.cache, max_bytes=max(1, int(budget * n)))
        for path, n in sample_bytes.items()
    }


def pick_group(store: Store, kind: str, name: str) -> str:
    """The path of the named group, or of the only one there is. Raises UserError naming the choices."""
    there = [path for path in store.groups() if path.startswith(f"{kind}/")]
    if name:
        return f"{kind}/{name}"  # opening it says so when it is not there
    if len(there) == 1:
        return there[0]
    if not there:
        fix = "pass --loss.projection-weight 0 to train without, or " if kind == "features" else ""
        raise UserError(f"store {store.root} has no {kind}; {fix}run make precompute to add them")
    names = ", ".join(path.partition("/")[2] for path in there)
    raise UserError(f"store {store.root} has several {kind} ({names}); choose with --data.{kind} NAME")


def model_config(config: TrainConfig, data: TrainingData) -> SiTConfig:
    """The model's geometry from the configuration and what the store holds. Raises UserError when they do not fit."""
    latents: dict[str, Any] = data.latents.identity
    height, width = latents["latent_size"]
    if height != width:
        raise UserError(f"latents of {height}×{width} are not square; SiT's position embedding needs a square")
    n_classes = config.model.classes or len(data.class_names)
    if n_classes < len(data.class_names):
        raise UserError(f"--model.classes {n_classes} is fewer than the store's {len(data.class_names)} classes")
    targets: tuple[tuple[int, int], ...] = ()
    if data.features is not None:
        grid = data.features.identity["token_grid"]
        side = height // config.model.patch
        if grid != [side, side]:
            raise UserError(
                f"{data.features.path} has {grid[0]}×{grid[1]} tokens, the model {side}×{side} (latents {height}, "
                f"patch {config.model.patch}); choose --model.patch {max(1, height // grid[0])}, or other features"
            )
        targets = ((config.model.align_block, data.features.identity["width"]),)
    return SiTConfig(
        input_size=height,
        channels=latents["latent_channels"],
        patch=config.model.patch,
        width=config.model.width,
        depth=config.model.depth,
        heads=config.model.heads,
        n_classes=n_classes,
        qk_norm=config.model.qk_norm,
        targets=targets,
        projector_width=config.model.projector_width,
    )
