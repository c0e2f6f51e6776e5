"""A decoder of a store's features: a training goes on, its folder decodes tokens as they are stored, flips match."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import photo_decoder
from benchmarks.photo_decoder import Tokens, Training, measure
from benchmarks.resumable import train
from storage import open_store
from storage.base.errors import UserError
from tests.stores import FEATURES, make_store
from trainer.evaluation.generate.feature_decoder import load_feature_decoder

N_ROWS, SIDE = 12, 32
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"decoder_hidden_size": 16, "decoder_intermediate_size": 16, "decoder_num_attention_heads": 2}
    monkeypatch.setattr(photo_decoder, "DECODER", {**photo_decoder.DECODER, **sizes})


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N_ROWS, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def tokens(tmp_path: Path, images: np.ndarray) -> Tokens:
    make_store(tmp_path / "store", n_rows=N_ROWS, n_views=2)
    store = open_store(tmp_path / "store")
    return Tokens(store.group(FEATURES), images, store.n_views)


def test_a_batch_is_a_function_of_the_step_and_a_flipped_view_goes_with_a_flipped_image(tokens: Tokens) -> None:
    (first, pictures), (again, same), (other, _) = (tokens.batch(step, 64) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(pictures, same)
    assert not torch.equal(first, other)
    known = {}
    for row, image in enumerate(tokens.images):
        known |= {image.tobytes(): row, image[:, ::-1].tobytes(): N_ROWS + row}
    pixels = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    clean = (torch.from_numpy(tokens.stored).float() - tokens.mean) / tokens.std
    for image, noisy in zip(pixels, first, strict=True):
        distances = (clean - noisy).square().sum((2, 3))
        assert int(distances.argmin()) == known[image.tobytes()]


def test_a_training_in_parts_is_the_whole_and_its_folder_decodes_stored_tokens(
    tmp_path: Path, tokens: Tokens, images: np.ndarray
) -> None:
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in parts:
            training = Training(tmp_path / name, tokens, 4, CPU)
            take = training.take
            training.take = lambda _, take=take: take(4)  # type: ignore[method-assign,misc]
            assert train(training, steps, 2, "decoder")
        training.write(tmp_path / name)
    mine, theirs = (Training(tmp_path / name, tokens, 4, CPU).decoder.state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    group = open_store(tmp_path / "store").group(FEATURES)
    loaded = load_feature_decoder(str(tmp_path / "whole"), group, CPU)
    stored = torch.from_numpy(tokens.stored[0]).float()
    with torch.inference_mode():
        wanted = training.decoder.unpatchify(training.decoder((stored - tokens.mean) / tokens.std).logits)
        found = loaded.decode(stored.transpose(1, 2).unflatten(2, tuple(group.identity.token_grid)))
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)  # weights are float16
    other = dataclasses.replace(group.identity, layer="block 8 of 12")
    with pytest.raises(UserError, match="decodes tokens of norm, and features/tiny-vit is of block 8 of 12"):
        load_feature_decoder(str(tmp_path / "whole"), SimpleNamespace(identity=other, path=FEATURES), CPU)  # type: ignore[arg-type]
    measured = measure(tmp_path / "whole", group, images, CPU)
    assert measured["n"] == N_ROWS
    assert measured["mean_db"] == pytest.approx(_psnr(images, wanted), abs=0.05)


def test_passes_in_bfloat16_move_float32_s_weights_nearly_alike(tmp_path: Path, tokens: Tokens) -> None:
    moved = {}
    for precision in ("fp32", "bf16"):
        training = Training(tmp_path / precision, tokens, 4, CPU, precision)
        before = training.decoder.decoder_pred.weight.detach().clone()
        psnr = training.take(4)
        moved[precision] = psnr, training.decoder.decoder_pred.weight.detach() - before
    assert moved["bf16"][1].dtype == torch.float32
    assert moved["bf16"][0] == pytest.approx(moved["fp32"][0], abs=0.05)
    assert torch.cosine_similarity(moved["bf16"][1].flatten(), moved["fp32"][1].flatten(), dim=0) > 0.9
    assert not torch.equal(moved["bf16"][1], moved["fp32"][1])


def _psnr(images: np.ndarray, decoded: torch.Tensor) -> float:
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    mse = np.square(images.astype(np.float64) - pixels).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / mse)))


def test_tokens_that_do_not_tile_the_images_are_refused(tmp_path: Path, tokens: Tokens) -> None:
    tokens.images = tokens.images[:, :31, :31]
    with pytest.raises(UserError, match="do not tile images of 31 px"):
        Training(tmp_path, tokens, 4, CPU)
