"""The map between stored latents and the model's: the public implementations' numbers, there and back, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.identity import LatentsIdentity
from storage.normalisation import Normalisation
from storage.weights.latent_statistics import read_statistics
from tests.trainer.reference import load_reference
from trainer.config.data import DataConfig
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop.losses import sample_latents

IDENTITY = LatentsIdentity(
    latent_channels=32, latent_size=(4, 4), latent_scale_factor=1.0, latent_shift_factor=0.0, posterior=False
)


def by(statistics: Normalisation, factor: float = 1.0) -> LatentScale:
    return LatentScale.of(replace(IDENTITY, latent_normalisation=statistics.plain(), latent_scale_factor=factor))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())


def test_lightningdits_input_and_what_it_decodes_are_ours(tmp_path: Path) -> None:
    """From `latents_stats.pt` as it lies there, with its multiplier; flipped latents by the same statistics."""
    reference = load_reference("latents")
    torch.save({"mean": reference["stats/mean"], "std": reference["stats/std"]}, tmp_path / "latents_stats.pt")
    scale = by(read_statistics(tmp_path / "latents_stats.pt", 32), float(reference["multiplier"]))
    close(scale.normalised(reference["latents"]), reference["model_input"])
    close(scale.normalised(reference["latents_flip"]), reference["model_input_flip"])
    close(scale.stored(reference["model_input"].double()).float(), reference["denormalised"])


@pytest.mark.parametrize(("name", "epsilon"), [("repae", 1e-4), ("irepa", 0.0)])
def test_repa_es_and_irepas_inputs_are_ours(tmp_path: Path, name: str, epsilon: float) -> None:
    reference = load_reference("latents")
    saved = {key: reference[f"repae/{key}"] for key in ("latents_scale", "latents_bias")}
    torch.save(saved, tmp_path / "x-latents-stats.pt")
    scale = by(read_statistics(tmp_path / "x-latents-stats.pt", 32, epsilon=epsilon))
    close(scale.normalised(reference["repae/posterior_sample"]), reference[f"{name}/model_input"])
    close(scale.stored(reference[f"{name}/model_input"].double()).float(), reference["repae/posterior_sample"])
    if not epsilon:  # REPA-E adds ε as it normalises and none as it decodes
        close(scale.stored(reference["repae/model_input"].double()).float(), reference["repae/denormalised"])


def test_the_multiplier_counts_both_ways() -> None:
    statistics = Normalisation(mean=(1.0,) * 32, std=(2.0,) * 32, source="s")
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(by(statistics, 0.5).normalised(x), (x - 1) / 2 * 0.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]), st.floats(0.05, 4))
def test_there_and_back_is_where_it_was(seed: int, patch: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    n = 32 * patch**2
    statistics = Normalisation(
        mean=tuple(rng.normal(0, 3, n).tolist()),
        std=tuple(rng.uniform(0.1, 9, n).tolist()),
        source="s",
        patch=patch,
    )
    scale = by(statistics, factor)
    x = torch.from_numpy(rng.normal(0, 5, (2, 32, 4, 4)))
    torch.testing.assert_close(scale.stored(scale.normalised(x)), x, rtol=0, atol=1e-12)
    z = x.float()
    torch.testing.assert_close(scale.normalised(scale.stored(z)), z, rtol=1e-4, atol=1e-4 * max(1, 9 * factor))


def test_statistics_of_patches_are_of_folded_pixels() -> None:
    """Flux.2's pipeline folds 2 × 2 pixels into channels and normalises these, which its transformer then sees."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 1, 128), rng.uniform(0.5, 2, 128)
    x = torch.from_numpy(rng.standard_normal((2, 32, 4, 4)))
    folded = x.view(2, 32, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 2, 2)
    by_folded = (folded - torch.from_numpy(mean).view(1, -1, 1, 1)) / torch.from_numpy(std).view(1, -1, 1, 1)
    scale = by(Normalisation(mean=tuple(mean.tolist()), std=tuple(std.tolist()), source="bn", patch=2))
    close(F.pixel_unshuffle(scale.normalised(x), 2), by_folded)


def test_settings_choose_the_map() -> None:
    statistics = Normalisation(mean=(1.0,) * 32, std=(2.0,) * 32, source="a file")
    identity = replace(
        IDENTITY, latent_normalisation=statistics.plain(), latent_scale_factor=0.5, latent_shift_factor=0.0
    )
    assert str(LatentScale.of(identity, DataConfig())) == "(x − mean) · [0.25 … 0.25] a channel, by a file"
    assert str(LatentScale.of(identity, DataConfig(latent_normalisation="scale"))) == "(x − 0) · 0.5"
    given_ = DataConfig(latent_normalisation="channel", latent_mean=(3.0,) * 32, latent_std=(4.0,) * 32)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(LatentScale.of(identity, given_).normalised(x), (x - 3) / 4)
    plain = replace(IDENTITY, latent_scale_factor=0.3611, latent_shift_factor=0.1159)
    torch.testing.assert_close(LatentScale.of(plain, DataConfig()).normalised(x), (x - 0.1159) * 0.3611, rtol=0, atol=0)


def test_a_compiled_step_takes_the_map_as_it_is() -> None:
    """Tensors of a frozen object, in one graph; nothing in it waits for a device."""
    statistics = Normalisation(mean=(1.0, -2.0, 3.0), std=(2.0, 0.5, 4.0), source="s")
    identity = LatentsIdentity(
        latent_channels=3, latent_size=(4, 4), latent_scale_factor=1.0, latent_normalisation=statistics.plain()
    )
    scale = LatentScale.of(identity)
    compiled = torch.compile(sample_latents, fullgraph=True, backend="eager")
    for step in range(2):
        batch = Batch(
            step=step, rows=torch.arange(4), labels=torch.zeros(4, dtype=torch.int64),
            moments=torch.randn(4, 6, 4, 4).half(), targets=(), stall_s=0.0,
        )  # fmt: skip
        assert torch.equal(compiled(batch, scale, 0), sample_latents(batch, scale, 0))
