"""Stored moments as latents: what NumPy, tensors and the trainer make of the same draws is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from storage import UserError, to_latents
from storage.identity import FeaturesIdentity, LatentsIdentity
from storage.latents import shift_and_scale, stored
from storage.normalisation import Normalisation
from storage.torch import to_latents as of_tensors
from trainer.data.latent_scale import LatentScale

RNG = np.random.default_rng(0)
PLAIN = LatentsIdentity(
    name="vae", latent_channels=4, latent_size=(6, 6), latent_scale_factor=0.5, latent_shift_factor=0.25
)
WHOLE = replace(PLAIN, latent_scale_factor=1, latent_shift_factor=0)  # as some identities have them, without a point


def by_channel(patch: int) -> LatentsIdentity:
    n = 4 * patch**2
    statistics = Normalisation(
        mean=tuple(RNG.normal(size=n)), std=tuple(RNG.uniform(0.5, 2, n)), source="test", patch=patch
    )
    return replace(PLAIN, latent_shift_factor=0.0, latent_normalisation=statistics.plain())


IDENTITIES = {
    "factor": PLAIN,
    "whole": WHOLE,
    "channels": by_channel(1),
    "patches": by_channel(2),
    "none": replace(PLAIN, posterior=False),
}


def moments_of(identity: LatentsIdentity, n: int = 3) -> np.ndarray:
    mean, std = RNG.normal(size=(n, 4, 6, 6)), RNG.uniform(0.1, 1, (n, 4, 6, 6))
    return (np.concatenate([mean, std], 1) if identity.has_posterior else mean).astype(np.float16)


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
def test_all_three_are_one(identity: LatentsIdentity) -> None:
    """Against the formula by hand in float64, and the trainer's map."""
    moments = moments_of(identity)
    noise = np.random.default_rng(1).standard_normal((3, 4, 6, 6), dtype=np.float32)
    exact = moments.astype(np.float64)
    x = exact[:, :4] + exact[:, 4:] * noise if identity.has_posterior else exact
    if identity.latent_normalisation is None:
        z = (x - identity.latent_shift_factor) * identity.latent_scale_factor
    else:
        p = identity.latent_normalisation.get("patch", 1)
        mean, std = (np.reshape(identity.latent_normalisation[of], (4, p, p)) for of in ("mean", "std"))
        z = np.empty_like(x)
        for i, j in np.ndindex(6, 6):
            z[:, :, i, j] = (x[:, :, i, j] - mean[:, i % p, j % p]) / std[:, i % p, j % p] * 0.5
    ours = to_latents(moments, identity, np.random.default_rng(1))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, z, atol=1e-5)
    of_trainer = LatentScale.of(identity).normalised(torch.from_numpy(x).float())
    np.testing.assert_allclose(of_trainer.numpy(), z, atol=1e-5)
    np.testing.assert_array_equal(
        of_tensors(torch.from_numpy(moments), identity, "mean").numpy(), to_latents(moments, identity, "mean")
    )
    drawn = to_latents(moments, identity, np.random.default_rng(1), normalise=False)
    np.testing.assert_allclose(drawn, x, atol=1e-5)


def test_there_and_back() -> None:
    x = RNG.normal(size=(2, 4, 6, 6))
    shift, scale = shift_and_scale(IDENTITIES["channels"])
    np.testing.assert_allclose(stored((x - shift) * scale, shift, scale), x)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_draws_have_the_posterior_s_mean_and_deviation(kind: str) -> None:
    one = moments_of(PLAIN, 1)
    many = np.repeat(one, 4000, 0)
    if kind == "numpy":
        z = to_latents(many, PLAIN, np.random.default_rng(0), normalise=False)
    else:
        generator = torch.Generator().manual_seed(0)
        z = of_tensors(torch.from_numpy(many), PLAIN, generator, normalise=False).numpy()
    mean, std = one[0].astype(np.float64).reshape(2, 4, 6, 6)
    assert np.abs((z.mean(0) - mean) / std).max() < 5 / 4000**0.5
    assert np.abs(z.std(0) / std - 1).max() < 5 / 8000**0.5


def test_of_features_the_map_is_another_one() -> None:
    with pytest.raises(UserError, match="pass that of a group latents/NAME"):
        to_latents(moments_of(PLAIN), FeaturesIdentity(width=4), "mean")


@pytest.mark.parametrize("wrong", [moments_of(PLAIN)[0], moments_of(IDENTITIES["none"])])
def test_moments_of_another_shape_are_refused(wrong: np.ndarray) -> None:
    for convert, moments in ((to_latents, wrong), (of_tensors, torch.from_numpy(wrong))):
        anything: Any = convert
        with pytest.raises(UserError, match=r"moments of vae are \(B, 8, 6, 6\), got"):
            anything(moments, PLAIN, "mean")


@pytest.mark.parametrize("draw", [0, None, "median", np.random.RandomState(0)])
def test_what_draws_nothing_is_refused(draw: Any) -> None:
    moments = moments_of(PLAIN)
    with pytest.raises(UserError, match=r'draw is a numpy.random.Generator, or "mean" for no noise, got'):
        to_latents(moments, PLAIN, draw)
    with pytest.raises(UserError, match=r'draw is a torch.Generator, or "mean" for no noise, got'):
        of_tensors(torch.from_numpy(moments), PLAIN, draw)
