"""The photographs' autoencoder: batches are a function of the step, a training goes on, and the pipeline loads it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import photo_vae
from benchmarks.photo_vae import Training, batch_of, measure, train_all
from benchmarks.resumable import learning_rate
from storage.base.errors import UserError
from tests.pipeline.containers import photographs, write_image_folder

SIDE = 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = photo_vae.VAE_CONFIG | {"block_out_channels": (8, 8, 8, 8)}
    monkeypatch.setattr(photo_vae, "VAE_CONFIG", config)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)


def options(out: Path, steps: int) -> argparse.Namespace:
    return argparse.Namespace(
        out=out, resolution=SIDE, start=None, device=photo_vae.CPU, precision="fp32", steps=steps, batch=8, save_every=2
    )


def test_a_batch_is_a_function_of_the_step_crops_first_then_wholes(images: np.ndarray) -> None:
    first, again, other = (batch_of(images, step, 8, 8) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, SIDE // 2, SIDE // 2)
    whole = batch_of(images, 7, 8, 8)
    assert whole.shape == (2, 3, SIDE, SIDE)
    known = {image.tobytes() for image in images} | {image[:, ::-1].tobytes() for image in images}
    pixels = ((whole.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert all(np.ascontiguousarray(image).tobytes() in known for image in pixels)


def test_a_training_of_another_version_is_refused(tmp_path: Path, images: np.ndarray) -> None:
    torch.save({"model": {}, "optimizer": {}, "step": 3}, tmp_path / "training.pt")
    with pytest.raises(UserError, match="another version"):
        Training(tmp_path, images, 8)


def test_images_are_read_as_the_pipeline_crops_them_and_one_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "photographs", photographs(2, 3))
    read = photo_vae.read_images(data, SIDE)
    assert read.shape == (6, SIDE, SIDE, 3)
    assert read.std(axis=(1, 2, 3)).min() > 0
    next((tmp_path / "photographs").rglob("*.*")).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        photo_vae.read_images(data, SIDE)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [learning_rate(1.0, step, 1000) for step in range(1001)]
    assert rates[0] < rates[50] < rates[100] == rates[750] == max(rates)
    assert rates[750] > rates[900] > rates[1000] == 0


def test_a_training_that_was_stopped_ends_as_one_that_was_not_and_the_pipeline_loads_it(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_all(options(tmp_path / "whole", 4), images)
    take = Training.take

    def stopped_after_two(self: Training, *arguments: object) -> float:
        if self.step == 2:
            raise KeyboardInterrupt
        return take(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "take", stopped_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_all(options(tmp_path / "parts", 4), images)
    monkeypatch.setattr(Training, "take", take)
    assert train_all(options(tmp_path / "parts", 4), images)
    mine, theirs = (Training(tmp_path / name, images, 8).vae.state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    found = measure(tmp_path / "parts", images)
    assert found["n"] == len(images)
    assert found == json.loads((tmp_path / "parts" / "psnr.json").read_text())
    assert (tmp_path / "parts" / "contact-sheet.png").is_file()
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert config["scaling_factor"] != 0.18215
