"""Settings that nobody spelled out: a new run chooses and saves them, a resumed run keeps to what it saved."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from trainer.config.saved import parse_config
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, leaves, override
from trainer.data.groups import TrainingData
from trainer.data.latent_scale import measured
from trainer.ranks.world import World
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.latent_map import statistics_of_run

GROUPS = ("data.latents", "data.features")
DIMENSION = 4096  # of the latents whose noise levels are not shifted (RAE)
NORMALISATION = ("data.latent_normalisation", "data.latent_mean", "data.latent_std")


def remember(config: TrainConfig, given: Collection[str] = ()) -> TrainConfig:
    """What the run saved stays where `config` does not say otherwise; `given` are settings that were given explicitly.

    A run that chose the only group there was keeps to it when a store has gained others, and one that measured its
    latents keeps the statistics that its weights were trained with. A setting that is younger than the run is as before
    it existed, whatever today's preset says.
    """
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return config
    saved = parse_config(read_state(checkpoint).config, f"checkpoint {checkpoint}")
    unnamed = {name for name in GROUPS if not flatten(config)[name]} - (set() if config.aligns else {"data.features"})
    chosen = {name: value for name, value, _ in leaves(saved.config) if name in unnamed}
    if not config.data.latent_mean and not saved.absent & set(NORMALISATION):
        now, then = config.data.latent_normalisation, saved.config.data.latent_normalisation
        if now == then or (now == "auto" and NORMALISATION[0] not in given):
            chosen |= {name: value for name, value, _ in leaves(saved.config) if name in NORMALISATION}
    now_by, then_by = config.data, saved.config.data
    same = now_by.latents in ("", then_by.latents) and now_by.latent_statistics == then_by.latent_statistics
    if same and not now_by.latent_statistics_sha256:
        chosen["data.latent_statistics_sha256"] = then_by.latent_statistics_sha256
    return override(saved.keep(config, given), chosen)


def with_shifts(config: TrainConfig, n: int) -> TrainConfig:
    """The configuration with the shifts of noise levels written out that are those of latents of `n` numbers."""
    trained = config.loss.time_shift or math.sqrt(n / DIMENSION)
    return override(config, {"loss.time_shift": trained, "sample.shift": config.sample.shift or trained})


def resolve(config: TrainConfig, data: TrainingData, world: World) -> TrainConfig:
    """The configuration with what was chosen automatically written out, so that a resume chooses the same."""
    resolved: dict[str, Any] = {"data.latents": data.latents.path.removeprefix("latents/")}
    if not config.data.features:  # all targets share the only features there are
        resolved["data.features"] = tuple({group.path.removeprefix("features/") for group in data.features})
    if config.data.latent_normalisation == "channel" and not config.data.latent_mean:
        statistics = measured(data.latents)
        resolved |= {"data.latent_mean": statistics.mean, "data.latent_std": statistics.std}
    if not data.class_names and not config.model.classes:
        resolved["sample.guidance"] = 1.0  # towards what, without labels?
    if config.precision == "auto":
        resolved["precision"] = "bf16" if world.device.type == "cuda" else "fp32"
    latents = data.latent_identity
    if data.of_features:
        resolved["data.latent_statistics_sha256"] = statistics_of_run(config, data, config.run).digest
    return with_shifts(override(config, resolved), latents.latent_channels * math.prod(latents.latent_size))
