"""A run's map of latents (`data/latent_scale.py`), whatever its latents are; of features, the statistics that it keeps.

Statistics of features have a number a channel and place, too many for a configuration. Its place has their SHA-256, and
the run's folder a copy in RAE's format (`latent-statistics.safetensors`), of tokens without the affine part of the
final norm where the group says what that is; the copy names that part, or none. So a run goes on, and is sampled from,
with the map that it was trained with, whatever became of the store.
"""

from __future__ import annotations

from pathlib import Path

from storage import UserError, places
from storage.base.boundary import read_regular
from storage.base.files import write_atomic
from storage.places import PlaceStatistics
from trainer.config.schema import TrainConfig
from trainer.data.feature_latents import norm_digest, require_normal, scale_of, statistics_of
from trainer.data.groups import TrainingData
from trainer.data.latent_scale import LatentScale, require_deviation
from trainer.run.folder import RunFolder

MAX_BYTES = 1 << 28
NORM = "final_norm"  # in the metadata of a run's copy


def map_of(config: TrainConfig, data: TrainingData, run: Path) -> LatentScale:
    """The map of the run at `run`. Raises UserError where statistics are missing, or not those of the configuration."""
    if not data.of_features:
        return LatentScale.of(data.latent_identity, config.data)
    statistics = statistics_of_run(config, data, run)
    return scale_of(data.latents, statistics, source=f"statistics {statistics.digest[:12]}")


def require_normalised(config: TrainConfig, data: TrainingData, scale: LatentScale) -> str:
    """Raise UserError where latents are far from mean 0 and deviation 1; returns what there is to say of them."""
    if data.of_features:
        accept = config.data.latent_deviation == "accept"
        return require_normal(data.latents, data.valid_rows, scale, accept=accept)
    return require_deviation(data.latents, scale, config.data)


def statistics_of_run(config: TrainConfig, data: TrainingData, run: Path) -> PlaceStatistics:
    """Those that the run keeps, else those that its configuration names."""
    wanted, copy = config.data.latent_statistics_sha256, RunFolder(run).latent_statistics
    if wanted and copy.is_file():
        fix = f"restore it, or remove it to take those of {data.latents.path} again"
        raw = read_regular(copy, MAX_BYTES)
        kept = places.unpacked(raw, str(copy), fix, places.shape_of(data.latents))
        if kept.digest == wanted:
            _require_norm(data, run, places.metadata(raw).get(NORM))
            return kept
    of_latents = data.class_tokens is not None
    statistics, source = statistics_of(data.store, data.latents, config.data.latent_statistics, class_token=of_latents)
    if wanted and statistics.digest != wanted:
        raise UserError(
            f"{run} was trained with other statistics of {data.latents.path} than {source} ({wanted[:12]} and "
            f"{statistics.digest[:12]}); restore {copy}"
        )
    return statistics


def packed(statistics: PlaceStatistics, data: TrainingData) -> bytes:
    """A run's copy."""
    return statistics.packed(**{NORM: norm_digest(data.latents)})


def keep_statistics(config: TrainConfig, data: TrainingData) -> None:
    """Write the run's copy, before anything is trained with it."""
    if data.of_features:
        statistics = statistics_of_run(config, data, config.run)
        write_atomic(RunFolder(config.run).latent_statistics, packed(statistics, data), "statistics")


def _require_norm(data: TrainingData, run: Path, kept: str | None) -> None:
    """`kept` is what a copy says, None of one of before it was said there: a map has no trace of it."""
    now = norm_digest(data.latents)
    if kept not in (None, now):
        raise UserError(
            f"{run} was trained when {data.latents.path} said that the affine part of its final norm is {kept[:12]}, "
            f"and it says {now[:12]} now, so the same statistics are another map; pass --store with the store that it "
            "was trained from, or train another run"
        )
