"""The committed tiny encoders: what they are, how large, and how good on crops they were not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.encoders import registry
from pipeline.encoders.tiny import RESOLUTION, TINY_VAE, TINY_VIT
from pipeline.encoders.tiny.train import probe_accuracy, psnr_db, split_images
from storage.identity import FeaturesIdentity, LatentsIdentity, parse

LARGEST_BYTES = 8_000_000
CPU = torch.device("cpu")


def test_they_are_small_enough_to_commit() -> None:
    files = [path for directory in (TINY_VAE, TINY_VIT) for path in directory.iterdir()]
    assert {path.name for path in files} >= {"diffusion_pytorch_model.safetensors", "model.safetensors", "config.json"}
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES


def test_their_geometries_fit_each_other() -> None:
    """8×8 tokens: the grid of a transformer with patch 2 over 16×16 latents."""
    latents = registry.describe(registry.resolve_latents("tiny-vae"), resolution=RESOLUTION)
    features = registry.describe(registry.resolve_features("tiny-vit"), resolution=RESOLUTION)
    assert isinstance(latents, LatentsIdentity)
    assert isinstance(features, FeaturesIdentity)
    assert (latents.latent_channels, latents.latent_size) == (4, (16, 16))
    assert features.token_grid == tuple(side // 2 for side in latents.latent_size)
    for identity in (latents, features):
        assert parse(type(identity), identity.plain(), "", "") == identity


def test_psnr_is_what_its_formula_says() -> None:
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(psnr_db(black, np.stack([black[0] + 255, black[0] + 1])), [0.0, 20 * np.log10(255)])


@pytest.fixture(scope="module")
def latents_and_pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out crops, of parts of the photographs that training never saw; their moments; their reconstructions."""
    images, _ = split_images("heldout", 4)
    vae = registry.load(registry.resolve_latents("tiny-vae"), resolution=RESOLUTION, device=CPU)
    moments = registry.encode_images(vae, images)["moments"].astype(np.float32)
    return images, moments, vae.decode(moments[:, :4])  # type: ignore[attr-defined]


def test_tiny_vae_reconstructs_what_it_never_saw(
    latents_and_pictures: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    images, _, reconstructions = latents_and_pictures
    db = psnr_db(images, reconstructions)
    assert db.mean() >= 25, db
    mean_colour = np.broadcast_to(images.mean((1, 2), keepdims=True).round(), images.shape)
    flat_db = psnr_db(images, mean_colour)
    gain_db = (db - flat_db)[flat_db < 25]  # of crops that are more than one colour; fine texture gains least, 2 dB
    assert len(gain_db) > len(images) / 2
    assert gain_db.min() > 0
    assert np.median(gain_db) > 6


def test_scaled_latents_have_unit_variance(latents_and_pictures: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, moments, _ = latents_and_pictures
    noise = np.random.default_rng(0).standard_normal(moments[:, 4:].shape)
    scale = registry.describe(registry.resolve_latents("tiny-vae"), resolution=RESOLUTION).latent_scale_factor
    latents = (moments[:, :4] + moments[:, 4:] * noise) * scale
    assert 0.8 < latents.std() < 1.2
    assert np.abs(latents).max() < 20


def test_a_linear_probe_reads_the_photograph_from_tiny_vit() -> None:
    """On other crops, of the same part of the photographs as the training crops: many of their pixels overlap."""
    vit = registry.load(registry.resolve_features("tiny-vit"), resolution=RESOLUTION, device=CPU)
    sets = []
    for n_per_class, seed in ((24, 0), (8, 1)):
        images, labels = split_images("train", n_per_class, seed)
        patches = np.concatenate([registry.encode_images(vit, part)["patches"] for part in np.array_split(images, 4)])
        sets.append((patches.astype(np.float32).mean(axis=1), labels))
    assert probe_accuracy(*sets[0], *sets[1]) >= 0.9


def test_tiny_vit_tokens_say_where_and_not_only_what() -> None:
    """Tokens of one image differ among themselves about as much as images do; a class constant would not."""
    images, _ = split_images("train", 2, 1)
    vit = registry.load(registry.resolve_features("tiny-vit"), resolution=RESOLUTION, device=CPU)
    patches = registry.encode_images(vit, images)["patches"].astype(np.float32)
    within = patches.var(axis=1).mean()
    between = patches.mean(axis=1).var(axis=0).mean()
    assert within > 0.2 * between
