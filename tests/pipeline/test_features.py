"""Feature files of images: Inception beside the library's own forward pass, vision encoders, reuse, missing weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as library
from PIL import Image
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from pipeline.__main__ import main
from pipeline.encoders import registry
from pipeline.encoders.inception import Inception, describe
from pipeline.features import FeaturesConfig, Job, write_features
from storage.base.console import EXIT_OK
from storage.base.errors import UserError
from storage.feature_file import FeatureFile, open_feature_file
from tests.inception import write_random_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights-inception.pth")


def images(n: int, side: int = 48) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, side, side + 5, 3), dtype=np.uint8)


def spatial_by_hand(network: torch.nn.Module, x: Tensor) -> Tensor:
    """`mixed_6/conv` of the TensorFlow graph, channels last: layer by layer, without the library's forward."""
    x = (interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False) - 128) / 128
    names = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c"
    )
    for name in [*names.split(), "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"]:
        x = getattr(network, name)(x)
    return network.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1)  # type: ignore[union-attr, operator]


def test_inception_agrees_with_the_library(inception_weights: Path) -> None:
    pictures = images(3)
    network = library.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_weights))
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    pooled, logits = network(x)
    encoder = Inception(inception_weights, CPU)
    found = registry.encode_images(encoder, pictures)
    assert {name: array.shape for name, array in found.items()} == {
        "features": (3, 2048),
        "spatial": (3, 2023),
        "logits": (3, 1008),
    }
    np.testing.assert_allclose(found["features"], pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-3, atol=1e-4)
    expected = spatial_by_hand(network, x)
    assert expected.shape == (3, 17, 17, 7)
    np.testing.assert_allclose(found["spatial"].reshape(3, 17, 17, 7), expected, rtol=1e-4, atol=1e-5)
    one = registry.encode_images(encoder, pictures[1:2])
    np.testing.assert_allclose(one["spatial"][0], found["spatial"][1], rtol=1e-3, atol=1e-4)


def test_missing_or_wrong_inception_weights_say_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_weights: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    where = str(tmp_path / "hub" / "checkpoints")
    with pytest.raises(UserError, match="weights-inception-2015-12-05") as missing:
        describe(None)
    assert where in str(missing.value)
    assert "pass --weights FILE" in str(missing.value)
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist; fetch .*weights-inception"):
        describe(tmp_path / "nowhere.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds other weights"):
        Inception(tmp_path / "other.pth", CPU)
    assert describe(inception_weights).published_weights is False


def features_of(out: Path, folder: Path, **changes: object) -> tuple[str, FeatureFile]:
    options: dict[str, object] = {"encoder": "tiny-vit", "batch": 4, "device": "cpu", **changes}
    (said,) = write_features([Job(where=folder, out=out)], FeaturesConfig(**options))  # type: ignore[arg-type]
    return said, open_feature_file(out)


def test_a_vision_encoders_vectors_are_its_class_token_or_the_mean_of_its_patches(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pictures)
    spec = registry.resolve_features("tiny-vit")
    arrays = registry.encode_images(registry.load(spec, resolution=128, device=CPU), pictures)
    said, found = features_of(tmp_path / "cls.npz", tmp_path / "a.npz")
    np.testing.assert_allclose(found.read("features"), arrays["cls"].astype(np.float32), atol=2e-3)
    assert (found.label, found.images["n"]) == ("tiny-vit", 6)
    assert "6 images by tiny-vit" in said
    _, mean = features_of(tmp_path / "mean.npz", tmp_path / "a.npz", token="mean")
    np.testing.assert_allclose(mean.read("features"), arrays["patches"].astype(np.float32).mean(axis=1), atol=2e-3)
    assert mean.label == "tiny-vit-mean"
    assert mean.identity != found.identity


def test_what_is_described_already_is_kept_and_what_changed_is_not(tmp_path: Path) -> None:
    pictures = np.zeros((3, 128, 128, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pictures)
    features_of(tmp_path / "f.npz", tmp_path / "a.npz")
    before = (tmp_path / "f.npz").stat().st_mtime_ns
    said, _ = features_of(tmp_path / "f.npz", tmp_path / "a.npz")
    assert "kept" in said
    assert (tmp_path / "f.npz").stat().st_mtime_ns == before
    np.savez(tmp_path / "a.npz", pictures[:2])
    said, found = features_of(tmp_path / "f.npz", tmp_path / "a.npz")
    assert "kept" not in said
    assert found.images["n"] == 2


def test_what_cannot_be_described_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "wide.npz", np.zeros((2, 128, 130, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="square images, these are 130×128"):
        features_of(tmp_path / "f.npz", tmp_path / "wide.npz")
    with pytest.raises(UserError, match=r"unknown vision encoder 'vgg'.*and inception"):
        features_of(tmp_path / "f.npz", tmp_path / "wide.npz", encoder="vgg")
    with pytest.raises(UserError, match="--batch must be at least 1"):
        features_of(tmp_path / "f.npz", tmp_path / "wide.npz", batch=0)
    np.savez(tmp_path / "square.npz", np.zeros((2, 128, 128, 3), dtype=np.uint8))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        features_of(tmp_path / "f.npz", tmp_path / "square.npz", device="cuda")


def save_pictures(folder: Path, n: int, *, broken: range = range(0)) -> np.ndarray:
    pictures = np.random.default_rng(n).integers(0, 256, (n, 128, 128, 3), dtype=np.uint8)
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    for i in broken:
        (folder / f"{i:03d}.png").write_bytes(b"\xff\xd8\xff broken")
    return pictures


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder was given."""
    seen: list[int] = []
    encode = registry.encode_images

    def counted(encoder: registry.Encoder, images: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(len(images))
        return encode(encoder, images)

    monkeypatch.setattr("pipeline.encoders.registry.encode_images", counted)
    return seen


def test_images_that_cannot_be_read_are_named_and_left_out_within_the_limit(tmp_path: Path) -> None:
    save_pictures(tmp_path / "some", 20, broken=range(3, 13))
    said, found = features_of(tmp_path / "f.npz", tmp_path / "some")
    assert "10 could not be read and are left out: 003.png" in said
    assert (found.images["n"], found.images["n_failed"]) == (10, 10)
    assert [name for name, _ in found.images["failed"]] == [f"{i:03d}.png" for i in range(3, 13)]
    for i in range(3, 13):
        (tmp_path / "some" / f"{i:03d}.png").unlink()
    _, without = features_of(tmp_path / "g.npz", tmp_path / "some")
    np.testing.assert_allclose(found.read("features"), without.read("features"), atol=1e-5)
    assert found.images["digest"] == without.images["digest"]
    save_pictures(tmp_path / "many", 20, broken=range(3, 14))
    with pytest.raises(UserError, match=r"11 of the 20 images of .*many cannot be read, and 10 may \(--max-failures"):
        features_of(tmp_path / "h.npz", tmp_path / "many")
    assert features_of(tmp_path / "h.npz", tmp_path / "many", max_failures=0.55)[1].images["n"] == 9
    save_pictures(tmp_path / "none", 3, broken=range(3))
    with pytest.raises(UserError, match="none of the 3 images"):
        features_of(tmp_path / "h.npz", tmp_path / "none")


def test_what_was_described_is_kept_whatever_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    """An error at the end, a kill after a part, an image mended, removed or added: only what changed is described."""
    folder, out = tmp_path / "images", tmp_path / "f.npz"
    save_pictures(folder, 100)
    monkeypatch.setattr("pipeline.features.PART_IMAGES", 16)
    monkeypatch.setattr("pipeline.features.LOOKED_AT", 2)
    odd = folder / "097.png"
    Image.new("RGB", (120, 120)).save(odd)
    with pytest.raises(UserError, match=r"097\.png is 120×120.*pass --resolution"):
        features_of(out, folder)
    assert sum(encoded) == 96
    assert not out.exists()
    encoded.clear()
    Image.new("RGB", (128, 128)).save(odd)
    said, found = features_of(out, folder)
    assert "100 images by tiny-vit, 96 of them described before" in said
    assert sum(encoded) == 4
    assert not list(tmp_path.glob("f.npz.parts"))
    encoded.clear()
    (folder / "000.png").unlink()
    Image.new("RGB", (128, 128), "red").save(folder / "050a.png")
    _, now = features_of(out, folder)
    assert sum(encoded) == 1
    _, afresh = features_of(tmp_path / "g.npz", folder)
    np.testing.assert_allclose(now.read("features"), afresh.read("features"), atol=1e-5)
    assert now.images["digest"] == afresh.images["digest"] != found.images["digest"]


def test_every_set_is_looked_at_before_any_is_described(tmp_path: Path, encoded: list[int]) -> None:
    save_pictures(tmp_path / "good", 4)
    save_pictures(tmp_path / "broken", 4, broken=range(4))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "small.npz", np.zeros((4, 64, 64, 3), np.uint8))
    np.savez(tmp_path / "few.npz", np.zeros((2, 128, 128, 3), np.uint8))
    Image.new("RGB", (99, 99)).save(tmp_path / "broken" / "999.png")
    for i in range(6):
        Image.new("RGB", (128 + i, 128)).save(tmp_path / "empty" / f"{i}.gif")
    features_of(tmp_path / "like.npz", tmp_path / "good", token="mean")
    config = FeaturesConfig(encoder="tiny-vit", device="cpu", at_least=4)
    encoded.clear()
    for name, message in (
        ("broken", "tiny-vit"),
        ("empty", "differ in size"),
        ("small.npz", "tiny-vit"),
        ("few.npz", "holds 2 images, and at least 4"),
    ):
        jobs = [Job(where=tmp_path / where, out=tmp_path / "out" / where) for where in ("good", name)]
        with pytest.raises(UserError, match=message):
            write_features(jobs, config)
    with pytest.raises(UserError, match="vector: cls and mean"):
        write_features(jobs[:1], dataclasses.replace(config, like=tmp_path / "like.npz"))
    assert not encoded
    assert not (tmp_path / "out").exists()


def test_nothing_is_silent_before_the_first_image(
    tmp_path: Path, encoded: list[int], waits: list[str], behind_bars: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures(tmp_path / "images", 3)
    words = ["features", str(tmp_path / "images"), "--out", str(tmp_path / "f.npz"), "--encoder", "tiny-vit"]
    words += ["--device", "cpu"]
    assert main(words) == EXIT_OK
    before = ["loading libraries", "looking at the images", "looking for tiny-vit and its weights"]
    assert list(dict.fromkeys(waits)) == [*before, "reading what f.npz has", "writing f.npz"]
    assert behind_bars == ["loading the encoder, reading images", "", "tiny-vit: 3/3"]
    waits.clear()
    assert main([*words, "--check"]) == EXIT_OK
    assert list(dict.fromkeys(waits)) == before
    waits.clear()
    assert main([*words, "--check", "--no-next"]) == EXIT_OK
    assert set(waits) <= {"loading libraries"}, "the command that asks says so itself"
