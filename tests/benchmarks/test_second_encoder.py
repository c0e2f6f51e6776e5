"""The second pair of eyes: a feature file of what the network says, whatever names its weights come under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.effect.second_encoder import Network, describe, load, prepare
from storage.base.errors import UserError
from storage.feature_file import FEATURES, open_feature_file

CPU = torch.device("cpu")
N = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({f"under_another_name.{i}": tensor for i, tensor in enumerate(state.values()) if tensor.ndim}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_the_file_has_each_images_pooled_vector_in_order(images: Path, weights: Path) -> None:
    describe(str(images), weights, images.parent / "features.npz", 0, "cpu")
    found = open_feature_file(images.parent / "features.npz").read(FEATURES)
    pixels = np.stack([np.asarray(Image.open(images / f"{i}.png")) for i in range(N)])
    with torch.inference_mode():
        model = load(weights)
        wanted = model.forward_head(model.forward_features(prepare(pixels, CPU)), pre_logits=True).numpy()
    assert found.shape == (N, 1280)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2


def test_a_second_call_describes_nothing_and_another_networks_weights_are_an_error(images: Path, weights: Path) -> None:
    out = images.parent / "features.npz"
    describe(str(images), weights, out, 0, "cpu")
    assert "it was kept" in describe(str(images), weights, out, 0, "cpu")
    torch.save({"weight": torch.zeros(3)}, images.parent / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        load(images.parent / "other.pth")


def test_a_network_is_as_it_was_trained_or_says_in_its_name_what_is_not(images: Path, weights: Path) -> None:
    networks = (Network(), Network(padding="torch"), Network(resize="bilinear"))
    found = []
    for network in networks:
        out = images.parent / f"{network.name}.npz"
        describe(str(images), weights, out, 0, "cpu", network)
        file = open_feature_file(out)
        assert file.label == network.name
        found.append(file.read(FEATURES))
    assert [network.name for network in networks] == [
        "efficientnet-lite0", "efficientnet-lite0-torch-padding", "efficientnet-lite0-bilinear"
    ]  # fmt: skip
    for other in found[1:]:
        assert np.abs(found[0] - other).max() > 1e-3


def test_padding_alone_is_what_the_other_padding_changes(weights: Path) -> None:
    """At stride 2 one more row behind than before, against as many: the rest of the network is the same."""
    ours, other = load(weights), load(weights, Network(padding="torch"))
    for name, module in ours.named_modules():
        twin = other.get_submodule(name)
        assert (getattr(module, "eps", None), getattr(module, "stride", None)) == (
            getattr(twin, "eps", None), getattr(twin, "stride", None)
        )  # fmt: skip
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        stem, padded = (model.conv_stem for model in (ours, other))
        moved = torch.nn.functional.pad(pixels, (0, 1, 0, 1))
        torch.testing.assert_close(stem(pixels), torch.nn.functional.conv2d(moved, stem.weight, stride=2))
        torch.testing.assert_close(padded(pixels), torch.nn.functional.conv2d(pixels, stem.weight, stride=2, padding=1))


def test_the_next_network_takes_other_weights_and_larger_images(weights: Path) -> None:
    larger = Network(size="lite1")
    assert prepare(np.zeros((1, 32, 32, 3), dtype=np.uint8), CPU, larger).shape == (1, 3, 240, 240)
    with pytest.raises(UserError, match="of efficientnet-lite1"):
        load(weights, larger)
