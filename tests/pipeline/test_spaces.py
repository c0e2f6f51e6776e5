"""Extractors that metrics fix: their preprocessing and vectors beside a plain rendering, on shallow random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import FeaturesConfig
from pipeline.encoders import registry, spaces
from pipeline.features import Job, write_features
from storage.base.choices import CMMD, FDR6, SPACES
from storage.base.errors import UserError
from storage.feature_file import open_feature_file

CPU = torch.device("cpu")
# As the public code has them: pixels a side, antialiasing, mean and deviation of the first channel, width.
PUBLISHED = {
    "fdr-convnext": (224, True, 0.485, 0.229, 1024),
    "fdr-dinov2": (256, True, 0.485, 0.229, 1024),
    "fdr-mae": (224, True, 0.485, 0.229, 1024),
    "fdr-siglip": (224, True, 0.5, 0.5, 1152),
    "fdr-clip": (256, True, 0.48145466, 0.26862954, 1024),
    CMMD: (336, False, 0.48145466, 0.26862954, 768),
}


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one block: the real ones take minutes to make."""
    whole = spaces.build

    def build(space: spaces.Space, **settings: Any) -> Any:
        torch.manual_seed(0)
        return whole(space, **({"depths": (1, 1, 1, 1)} if space.vector == "map" else {"depth": 1}), **settings)

    monkeypatch.setattr(spaces, "build", build)


def by_hand(name: str, model: Any, x: Tensor) -> Tensor:
    """The vector, from the network's parts."""
    if name == "fdr-convnext":
        return model.stages(model.stem(x)).mean((2, 3))
    tokens = model.norm(model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(x)))))
    if name == "fdr-siglip":
        return model.attn_pool(tokens)
    if name == CMMD:
        projected = model.head(tokens[:, 0])
        return projected / projected.norm(dim=1, keepdim=True)
    return tokens[:, 0]


@pytest.mark.parametrize(
    "name",
    [CMMD, *(pytest.param(each, marks=[pytest.mark.slow] * (each != "fdr-mae")) for each in FDR6)],
)
@pytest.mark.usefixtures("shallow")
def test_an_extractor_is_the_published_one(name: str, tmp_path: Path) -> None:
    space = spaces.SPACES[name]
    side, antialias, mean, std, width = PUBLISHED[name]
    assert (space.side, space.antialias, space.normalisation.mean[0], space.normalisation.std[0], space.width) == (
        *(side, antialias, mean, std, width),
    )
    model = spaces.build(space)
    weights = tmp_path / "weights.pth"
    torch.save(
        model.state_dict() | {"head.fc.weight": torch.zeros(2)} if space.vector == "map" else model.state_dict(),
        weights,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = registry.encode_images(spaces.Extractor(name, weights, CPU), pictures)["features"]
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=antialias)
    mean3, std3 = (
        torch.tensor(values)[:, None, None] for values in (space.normalisation.mean, space.normalisation.std)
    )
    with torch.inference_mode():
        expected = by_hand(name, model.eval(), (x - mean3) / std3)
    assert found.shape == (2, width)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    identity = spaces.describe(name, weights)
    assert (identity.name, identity.encoder, identity.vector) == (name, f"timm.{space.model}", space.vector)
    assert f"bicubic to {side} with{'' if antialias else 'out'} antialias" in str(identity.preprocessing)


@pytest.mark.usefixtures("shallow")
def test_features_are_of_images_of_any_size_and_missing_weights_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 30, 40, 3), dtype=np.uint8))
    job = Job(where=tmp_path / "a.npz", out=tmp_path / "f.npz")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"weights of cmmd-clip are neither .*timm/vit_large_patch14_clip_336\.openai"):
        write_features([job], FeaturesConfig(encoder=CMMD, device="cpu"))
    torch.save(spaces.build(spaces.SPACES[CMMD]).state_dict(), tmp_path / "w.pth")
    config = FeaturesConfig(encoder=CMMD, weights=tmp_path / "w.pth", device="cpu", check=True)
    assert write_features([job], config) == []
    assert not job.out.exists()
    write_features([job], FeaturesConfig(encoder=CMMD, weights=tmp_path / "w.pth", device="cpu"))
    file = open_feature_file(job.out)
    np.testing.assert_allclose(np.linalg.norm(file.read("features"), axis=1), 1, rtol=1e-5)
    assert (file.label, file.images["size"]) == (CMMD, [30, 40])
    with pytest.raises(UserError, match=f"and inception, {', '.join(SPACES)}"):
        write_features([job], FeaturesConfig(encoder="nothing", device="cpu"))
