"""The settings of what is read from a store; `data/` does what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.base.errors import UserError
from storage.base.options import spelled
from trainer.config.declaring import at_least, option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read from the store."""

    latents: str = option(
        "",
        "latents to train on, a name below latents/, or features/NAME for an encoder's features as latents; empty: the "
        "only latents there are",
    )
    latent_statistics: Path = option(
        Path(),
        "features as latents: a published file of mean and var of each place (and mean_cls_token, var_cls_token), or "
        "an AutoencoderRAE's folder; empty: those that `python -m storage statistics --places` counted",
        free=True,
    )
    latent_statistics_sha256: str = option("", "of the numbers of these statistics, which the run keeps a copy of")
    features: tuple[str, ...] = option(
        (),
        "features to align with, names below features/, one a target; empty: the only ones there are",
        of_alignment=True,
        often=True,
    )
    latent_normalisation: Literal["auto", "scale", "channel"] = option(
        "auto",
        "auto: by the statistics of the latents' identity, if it has some, else by its factor; scale: by its factor; "
        "channel: by mean and deviation of every channel, over all latents",
    )
    decoder: str = option(
        "",
        "features as latents: what makes pictures of them, a folder or hub id of diffusers' AutoencoderRAE, or "
        "glyph-decoder; empty: what the group names",
        free=True,
    )
    latent_mean: tuple[float, ...] = option(
        (), "means of --data.latent-normalisation channel; empty: those of all latents, measured once and kept"
    )
    latent_std: tuple[float, ...] = option((), "deviations that go with --data.latent-mean")
    latent_deviation: Literal["refuse", "accept"] = option(
        "refuse",
        "what to do when the latents' deviation is far from 1 after they are normalised",
        free=True,
        before="accept",
    )
    resolution: int = option(0, "pixels a side that the store must have been made at; 0: any")
    failed_rows: Literal["leave-out", "refuse"] = option(
        "leave-out", "what to do when samples of a group used could not be decoded"
    )
    prefetch: int = option(3, "batches read ahead, each in its own (pinned) buffer", free=True)
    threads: int = option(0, "threads that gather rows of one array; 0: as the kind of store needs", free=True)
    resident: Literal["stream", "ram", "gpu"] = option(
        "stream",
        "stream: rows are read when they are visited; ram: all of them once, into one copy a machine, which its ranks "
        "share; gpu: into the memory of each rank's device. The batches are the same",
        free=True,
    )
    cache: Path = option(Path(), "folder on a local disk that keeps a part of a remote store", free=True)
    cache_gb: float = option(0.0, "most gigabytes that the cache takes, over all arrays", free=True)

    def __post_init__(self) -> None:
        at_least(self, "data", "prefetch", 1)
        at_least(self, "data", "threads", 0)
        at_least(self, "data", "resolution", 0)
        at_least(self, "data", "cache_gb", 0)
        if (self.cache != Path()) != (self.cache_gb > 0):
            raise UserError(
                "a cache needs a folder and a size; pass --data.cache DIR and --data.cache-gb N, or neither"
            )
        if "" in self.features:
            raise UserError(f"--data.features {spelled(self.features)} has an empty name; separate names by one comma")
        if len(self.latent_mean) != len(self.latent_std):
            raise UserError(
                f"--data.latent-mean has {len(self.latent_mean)} numbers and --data.latent-std {len(self.latent_std)}; "
                "give both a number a channel, or neither"
            )
        if self.latent_mean and self.latent_normalisation != "channel":
            raise UserError(
                "--data.latent-mean and --data.latent-std go with --data.latent-normalisation channel, not "
                f"{self.latent_normalisation}"
            )
        for value in self.latent_mean:
            if not math.isfinite(value):
                raise UserError(f"--data.latent-mean must be finite, got {value}")
        for value in self.latent_std:
            if not 0 < value < math.inf:
                raise UserError(f"--data.latent-std must be positive and finite, got {value}")
        if self.latents.startswith("features/") and self.latent_normalisation != "auto":
            raise UserError(
                f"--data.latents {self.latents} is normalised by channel and place; leave --data.latent-normalisation "
                f"at auto, not {self.latent_normalisation}"
            )
        if self.latent_statistics != Path() and not self.latents.startswith("features/"):
            raise UserError(
                "--data.latent-statistics is of features as latents; pass --data.latents features/NAME, or leave it out"
            )
        # as a shell completes names
        object.__setattr__(self, "latents", self.latents.rstrip("/").removeprefix("latents/"))
        of_features = tuple(name.rstrip("/").removeprefix("features/") for name in self.features)
        object.__setattr__(self, "features", of_features)
