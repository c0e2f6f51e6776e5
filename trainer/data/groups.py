"""What a run reads: the groups of the store that its configuration names, checked against each other and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import ArrayReader, CacheConfig, GroupReader, Store, UserError, open_store
from storage.base.shown import shown
from storage.codecs import TOKENS
from storage.identity import FeaturesIdentity, LatentsIdentity
from storage.index import far_apart
from storage.order import ValidRows
from storage.samples import REDO
from storage.shard_files import raise_open_file_limit
from storage.torch.codecs import TWINS
from trainer.alignment import alignment_named
from trainer.config.schema import TrainConfig
from trainer.data.feature_latents import CLASS_TOKEN, OF_FEATURES, latents_identity, require_features
from trainer.models.transformer import Geometry

MAX_CLASSES, CLASSES_A_SAMPLE = 1 << 16, 4  # more than either are not believed of a store


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Open readers and what they fit."""

    store: Store
    latents: GroupReader[Any]  # of an autoencoder, or of features whose tokens are the latents
    features: tuple[GroupReader[FeaturesIdentity], ...]  # one an alignment target; two targets may share one
    labels: np.ndarray  # int32 (N,), −1 for a sample without
    class_names: Sequence[str]  # none of a store that is trained on without labels
    valid_rows: ValidRows  # those that failed in no group
    class_tokens: GroupReader[FeaturesIdentity] | None = None  # those that are denoised: the first target's (REG), or
    # those of features as latents (RiT)

    def __repr__(self) -> str:
        groups = ", ".join(group.path for group in self.groups)
        return shown(f"<{type(self).__name__} of {self.store.root}: {self.n_samples:,} samples; {groups}>")

    @property
    def n_samples(self) -> int:
        """Samples that can be trained on."""
        return len(self.valid_rows)

    @property
    def of_features(self) -> bool:
        """Whether the latents are an encoder's features."""
        return isinstance(self.latents.identity, FeaturesIdentity)

    @property
    def latent_identity(self) -> LatentsIdentity:
        """What the latents are, of features too."""
        identity = self.latents.identity
        return latents_identity(identity) if isinstance(identity, FeaturesIdentity) else identity

    @property
    def aligns_class_tokens(self) -> bool:
        """Whether each target has its class token before its patch tokens (REG)."""
        return self.class_tokens is not None and not self.of_features

    @property
    def groups(self) -> tuple[GroupReader, ...]:
        """Every group that is read, once."""
        read: tuple[GroupReader, ...] = (self.latents, *self.features)
        return tuple({group.path: group for group in read}.values())

    @property
    def identities(self) -> dict[str, str]:
        """Group path → identity digest of what is read."""
        return {group.path: group.identity_digest for group in self.groups}

    def readers(self, *, with_targets: bool) -> dict[str, ArrayReader]:
        """What a step reads, "moments" and "<group>/<array>"; what two uses share is read once.

        Without targets no patch tokens are read but those that are latents, and no class tokens but those that are
        denoised.
        """
        aligned = self.features if with_targets else ()
        readers = {} if self.of_features else {"moments": self.latents["moments"]}
        for group in (*aligned, *((self.latents,) if self.of_features else ())):
            readers |= {f"{group.path}/{name}": group[name] for name in group.codec_arrays}
        with_class = (*aligned, self.class_tokens) if self.aligns_class_tokens else (self.class_tokens,)
        for group in with_class:
            if group is not None:
                readers[f"{group.path}/{CLASS_TOKEN}"] = group[CLASS_TOKEN]
        return readers

    def close(self) -> None:
        """Close every file."""
        for group in self.groups:
            group.close()


def open_data(config: TrainConfig) -> TrainingData:
    """Open the store's groups that the configuration needs.

    Raises StoreError or UserError, in one line, when the store, a group or a label is missing or does not fit.
    """
    store = open_store(config.require_store())
    if config.data.resolution not in (0, store.resolution):
        raise UserError(
            f"store {store.root} was made at {store.resolution} px, --data.resolution asks for "
            f"{config.data.resolution}; choose a preset of the store's resolution, or pass --data.resolution 0"
        )
    raise_open_file_limit()
    latents = pick_group(store, "latents", config.data.latents)
    features = [pick_group(store, "features", target.features) for target in config.targets]
    paths = dict.fromkeys([latents, *features])
    caches = _share_cache(config, store, list(paths))
    groups = {path: store.group(path, n_threads=config.data.threads or None, cache=caches.get(path)) for path in paths}
    of_features = latents.startswith(OF_FEATURES)
    if config.model.kind == "rit" and config.model.class_token and not of_features:
        raise UserError(
            f"--model.class-token of --model.kind rit is that of features as latents, and {latents} is of an "
            "autoencoder; pass --data.latents features/NAME, or --model.class-token false"
        )
    if config.model.kind == "sit" and config.model.class_token and of_features:
        raise UserError(
            f"--model.class-token of --model.kind sit joins an autoencoder's latents, and {latents} is of an encoder, "
            "whose own class token --model.kind rit denoises; pass --model.class-token false, or --model.kind rit"
        )
    if of_features:
        require_features(groups[latents], class_token=config.model.class_token and config.model.kind == "rit")
    else:
        groups[latents].require(
            "latent_channels", "latent_size", "latent_scale_factor", "latent_shift_factor", arrays=["moments"]
        )
    for path in features:
        groups[path].require("token_grid", "width")
        codec = groups[path].codec
        if not codec.exact and codec.name not in TWINS:
            raise UserError(
                f"{path} is in {codec.spelling} codes, right on average only, which have no twin in "
                "storage/torch/codecs/ to say what is known of the exact tokens; add one to TWINS, or choose features "
                "as float16 or int8"
            )
        if TOKENS not in groups[path].arrays:
            raise UserError(
                f"{path} holds {', '.join(groups[path].arrays)} and no patch tokens, which the alignment needs; choose "
                "other --data.features, or precompute it with patch tokens"
            )
        if config.model.class_token and config.model.kind == "sit" and CLASS_TOKEN not in groups[path].arrays:
            raise UserError(
                f"{path} holds no class tokens, which --model.class-token needs; precompute the features with "
                "tokens=both (--features ENCODER:tokens=both), or choose other --data.features"
            )
    failed = np.unique(np.concatenate([group.failed_rows for group in groups.values()]))
    if len(failed) and config.data.failed_rows == "refuse":
        raise UserError(
            f"{len(failed)} samples of {store.root} could not be decoded (first row {failed[0]}); {REDO}, or pass "
            "--data.failed-rows leave-out"
        )
    labels = store.classes.labels
    n_without = int((labels < 0).sum())
    if 0 < n_without < len(labels) and config.loss.label_dropout < 1:
        raise UserError(
            f"{n_without} of the {len(labels)} samples of {store.root} have no label (first row "
            f"{(labels < 0).argmax()}); class-conditional training needs one for each: label them all, or pass "
            "--loss.label-dropout 1 to train without any"
        )
    return TrainingData(
        store=store,
        latents=groups[latents],
        features=tuple(groups[path] for path in features),
        labels=labels,
        class_names=[] if n_without else store.classes.class_names,
        valid_rows=ValidRows(store.n_rows, failed),
        class_tokens=_class_tokens(config, groups[latents], [groups[path] for path in features]),
    )


def _class_tokens(
    config: TrainConfig, latents: GroupReader[Any], features: Sequence[GroupReader[Any]]
) -> GroupReader[Any] | None:
    """The group whose class tokens are denoised."""
    if not config.model.class_token:
        return None
    return latents if config.model.kind == "rit" else features[0]


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
    if kind == "latents" and name.startswith(OF_FEATURES):
        return name
    if name:
        return f"{kind}/{name}"  # opening it says so when it is not there, and a store over http cannot list
    paths = [path for path in store.groups() if path.startswith(f"{kind}/")]
    if len(paths) == 1:
        return paths[0]
    if not paths:
        fix = "pass --loss.projection-weight 0 to train without, or " if kind == "features" else ""
        of_features = [path for path in store.groups() if path.startswith(OF_FEATURES)]
        if kind == "latents" and of_features:
            fix = f"pass --data.latents {of_features[0]} to learn features as latents, or "
        raise UserError(f"store {store.root} has no {kind}; {fix}run make precompute to add them")
    names = ", ".join(path.partition("/")[2] for path in paths)
    raise UserError(f"store {store.root} has several {kind} ({names}); choose with --data.{kind} NAME")


def require_guided_channels(config: TrainConfig, geometry: Geometry) -> None:
    """Raise UserError where guidance is to act on more channels than the latents have."""
    guided, channels = config.sample.guidance_channels, geometry.channels
    if guided > channels:
        raise UserError(
            f"--sample.guidance-channels must be at most the latents' {channels} channels, got {guided}; pass "
            "--sample.guidance-channels 0 for all of them"
        )


def _require_width(config: TrainConfig, data: TrainingData) -> None:
    """Raise UserError where a velocity of tokens has more numbers than the model's last tokens have channels.

    Noise fills them all, so no such model can say what it is (RAE, arXiv 2510.11690, section 4). One that predicts the
    features themselves can.
    """
    width, name = config.model.width, "--model.width"
    if config.model.kind == "ditdh":
        width, name = config.model.head_width, "--model.head-width"
    wanted = data.latent_identity.latent_channels * config.model.patch**2
    if data.of_features and config.model.kind != "rit" and width < wanted:
        raise UserError(
            f"{name} {width} is below the {wanted} numbers of a token of {data.latents.path}, whose velocity no such "
            f"model can predict; give at least {wanted}, or --model.kind rit, which predicts the features"
        )


def geometry_of(config: TrainConfig, data: TrainingData) -> Geometry:
    """The model's geometry from the configuration and what the store holds. Raises UserError when they do not fit.

    A store without labels makes a model without classes, unless --model.classes says otherwise.
    """
    latents = data.latent_identity
    height, width = latents.latent_size
    if height != width:
        raise UserError(f"latents of {height}×{width} are not square; the model's position embedding needs a square")
    occurring, largest = len(data.store.classes.class_names.occurring), len(data.class_names) - 1
    if not config.model.classes and far_apart(largest, occurring):
        raise UserError(
            f"{data.store.root}: {occurring} labels occur and the largest is {largest:,}; a model has a row for each "
            "number up to it: precompute with --renumber-labels, or pass --model.classes N if it is meant"
        )
    n_classes = config.model.classes or len(data.class_names)
    if n_classes < len(data.class_names):
        raise UserError(f"--model.classes {n_classes} is fewer than the store's {len(data.class_names)} classes")
    if not config.model.classes and n_classes > max(MAX_CLASSES, CLASSES_A_SAMPLE * data.n_samples):
        raise UserError(
            f"{data.store.root} has labels up to {n_classes - 1} and {data.n_samples} samples; number the classes from "
            f"0 and precompute again, or pass --model.classes {n_classes} for an embedding of so many"
        )
    side = height // config.model.patch
    for features in data.features:
        grid = features.identity.token_grid
        if grid != (side, side):
            raise UserError(
                f"{features.path} has {grid[0]}×{grid[1]} tokens, the model {side}×{side} (latents {height}, patch "
                f"{config.model.patch}); choose --model.patch {max(1, height // grid[0])}, or other features"
            )
    _require_width(config, data)
    alignments = tuple(alignment_named(target.alignment) for target in config.targets)
    for target, features, kind in zip(config.targets, data.features, alignments, strict=True):
        if not features.codec.exact and not kind.linear:
            raise UserError(
                f"{features.path} is in {features.codec.spelling} codes, which are right on average only, and "
                f"--loss.alignment {target.alignment.partition(':')[0]} is not linear in its target; choose another "
                "alignment, or features as float16 or int8"
            )
    return Geometry(
        kind=config.model.kind,
        input_size=height,
        channels=latents.latent_channels,
        patch=config.model.patch,
        width=config.model.width,
        depth=config.model.depth,
        heads=config.model.heads,
        n_classes=n_classes,
        qk_norm=config.model.qk_norm,
        targets=tuple(
            (target.block, features.identity.width)
            for target, features in zip(config.targets, data.features, strict=True)
        ),
        alignments=alignments,
        class_width=data.class_tokens.identity.width if data.class_tokens is not None else 0,
        projector_width=config.model.projector_width,
        head_width=config.model.head_width,
        head_depth=config.model.head_depth,
        head_heads=config.model.head_heads,
        context=config.model.context,
        context_block=config.model.context_block,
    )
