"""The demo's encoders: what they are, how large with the others, and how good on fonts that they never saw."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from pipeline.encoders import registry
from pipeline.encoders.glyph import GLYPH_DECODER, GLYPH_NAMER, GLYPH_VIT
from pipeline.encoders.glyph.train import digits, of_patches
from pipeline.encoders.tiny import TINY_VAE, TINY_VIT
from pipeline.encoders.tiny.train import probe_accuracy, psnr_db
from pipeline.sources.glyphs import CLASSES, DEMO, RESOLUTION
from storage.base.errors import UserError
from storage.identity import FeaturesIdentity, LatentsIdentity

LARGEST_BYTES = 8_000_000
NAMES = ("glyph-vit", "glyph-namer")
CPU = torch.device("cpu")


@cache
def pictures(split: str, n_per_class: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return digits(split, n_per_class, 0, DEMO)


def patches(name: str, images: np.ndarray) -> np.ndarray:
    encoder = registry.load(registry.resolve_features(name), resolution=RESOLUTION, device=CPU)
    return registry.encode_images(encoder, images)["patches"].astype(np.float32)


def test_all_built_in_encoders_are_small_enough_to_commit() -> None:
    folders = (TINY_VAE, TINY_VIT, GLYPH_VIT, GLYPH_NAMER, GLYPH_DECODER)
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_their_tokens_lie_on_the_grid_of_a_patch_2_transformer_over_tiny_vae_s_latents(name: str) -> None:
    latents = registry.describe(registry.resolve_latents("tiny-vae"), resolution=RESOLUTION)
    features = registry.describe(registry.resolve_features(name), resolution=RESOLUTION)
    assert isinstance(latents, LatentsIdentity)
    assert isinstance(features, FeaturesIdentity)
    assert features.token_grid == tuple(side // 2 for side in latents.latent_size) == (4, 4)
    with pytest.raises(UserError, match=f"{name} knows 64 px only; pass --resolution 64, got 128"):
        registry.describe(registry.resolve_features(name), resolution=128)


def test_tiny_vae_keeps_digits_though_it_never_saw_one() -> None:
    images, _, _ = pictures("heldout", 4)
    vae = registry.load(registry.resolve_latents("tiny-vae"), resolution=RESOLUTION, device=CPU)
    moments = registry.encode_images(vae, images)["moments"].astype(np.float32)
    assert psnr_db(images, vae.decode(moments[:, :4])).mean() >= 22  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_a_linear_probe_reads_the_digit(name: str) -> None:
    """In fonts, and over parts of photographs, that the encoder never saw."""
    train, labels, _ = pictures("train", 24)
    others, their_labels, _ = pictures("heldout", 12)
    means = [patches(name, images).mean(axis=1) for images in (train, others)]
    assert probe_accuracy(means[0], labels, means[1], their_labels) >= LEAST[name]


LEAST = {"glyph-vit": 0.9, "glyph-namer": 0.9}


def test_glyph_vit_s_tokens_say_where_the_digit_is() -> None:
    """A linear map of tokens tells what of a patch is covered, far better than the patch's place alone."""
    images, _, covered = pictures("train", 24)
    tokens, target = patches("glyph-vit", images), of_patches(torch.from_numpy(covered)).mean(-1).numpy()
    n = len(images) // 2
    order = np.random.default_rng(0).permutation(len(images))
    fit, held = order[:n], order[n:]
    design = np.concatenate([tokens, np.ones((*tokens.shape[:2], 1), np.float32)], -1)
    flat = design[fit].reshape(-1, design.shape[-1])
    weights = np.linalg.solve(flat.T @ flat + np.eye(flat.shape[1]), flat.T @ target[fit].reshape(-1))
    error = ((design[held] @ weights - target[held]) ** 2).mean()
    by_place = ((target[fit].mean(0) - target[held]) ** 2).mean()
    assert error < 0.5 * by_place


def test_classes_are_those_of_the_index() -> None:
    assert [CLASSES[label] for label in np.unique(pictures("train", 24)[1])] == list(CLASSES)
