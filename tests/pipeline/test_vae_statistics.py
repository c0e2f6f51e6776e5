"""Autoencoders that normalise their latents channel by channel: the identity has their statistics, to the number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLWan
from safetensors.torch import load_file, save_file

from pipeline.encoders import registry
from storage.base.errors import UserError
from storage.normalisation import normalisation_of
from tests.pipeline.autoencoders import CPU, KL, WAN, encode, pictures, save, to_input
from trainer.data.latent_scale import LatentScale
from trainer.evaluation.generate.decode import decode_latents, load_decoder

FLUX2: dict[str, Any] = {**KL, "latent_channels": 4, "sample_size": 32}
VAVAE: dict[str, Any] = {  # factor 16, statistics in the configuration
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "block_out_channels": (8,) * 5,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "latents_mean": [0.5, -1.0, 2.0],
    "latents_std": [3.0, 0.5, 1.5],
    "scaling_factor": 1.0,
}


@pytest.fixture(scope="module")
def by_channel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real classes that bring statistics of their latents, with random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("by-channel")
    flux = AutoencoderKLFlux2(**FLUX2)
    flux.bn.running_mean.normal_()
    flux.bn.running_var.uniform_(0.5, 3)
    made = {"wan": AutoencoderKLWan(**WAN), "flux2": flux, "vavae": AutoencoderKL(**VAVAE)}
    return {name: save(model, root / name) for name, model in made.items()}


@pytest.mark.parametrize(("name", "side"), [("wan", 16), ("flux2", 16), ("vavae", 4)])
def test_statistics_of_an_autoencoder_are_its_identitys(by_channel: dict[str, Path], name: str, side: int) -> None:
    identity, moments = encode(str(by_channel[name]), 64)
    found = normalisation_of(identity)
    assert found is not None
    assert identity.latent_size == (side, side)
    assert (identity.latent_scale_factor, identity.latent_shift_factor) == (1.0, 0.0)
    if name == "flux2":
        bn = AutoencoderKLFlux2.from_pretrained(by_channel[name]).bn
        assert found.patch == 2
        torch.testing.assert_close(torch.tensor(found.mean), bn.running_mean)
        torch.testing.assert_close(torch.tensor(found.std), (bn.running_var + 1e-4).sqrt())
        assert found.source == "bn.running_mean and bn.running_var of the AutoencoderKLFlux2"
    else:
        config = WAN if name == "wan" else VAVAE
        assert (list(found.mean), list(found.std)) == (config["latents_mean"], config["latents_std"])
    model = load_decoder(str(by_channel[name]), CPU)
    x = to_input(pictures(3, 64))
    with torch.inference_mode():
        posterior = model.encode(x[:, :, None] if name == "wan" else x).latent_dist  # type: ignore[operator]
    wanted = posterior.mean[:, :, 0] if name == "wan" else posterior.mean
    np.testing.assert_allclose(moments[:, : identity.latent_channels], wanted.numpy(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["wan", "flux2", "vavae"])
def test_both_stages_decode_them_alike(by_channel: dict[str, Path], name: str) -> None:
    identity, moments = encode(str(by_channel[name]), 64)
    latents = moments[:, : identity.latent_channels].astype(np.float32)
    loaded: Any = registry.load(registry.resolve_latents(str(by_channel[name])), resolution=64, device=CPU)
    decoder = load_decoder(str(by_channel[name]), CPU)
    ours, theirs = loaded.decode(latents), decode_latents(torch.from_numpy(latents), decoder)
    assert ours.shape == (3, 64, 64, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    z = torch.from_numpy(latents)
    with torch.inference_mode():
        pixels = decoder.decode(z[:, :, None] if name == "wan" else z).sample  # type: ignore[operator]
    pixels = pixels[:, :, 0] if name == "wan" else pixels
    wanted = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(theirs - wanted).max() <= 0.51


def test_the_scaling_factor_counts_beside_statistics(tmp_path: Path) -> None:
    """As diffusers' pipelines have it: (x − mean) · scaling_factor / std."""
    model = AutoencoderKL(**{**VAVAE, "scaling_factor": 0.5})
    identity = registry.describe(registry.resolve_latents(str(save(model, tmp_path / "x"))), resolution=64)
    assert identity.latent_scale_factor == 0.5  # type: ignore[attr-defined]
    scale = LatentScale.of(identity)  # type: ignore[arg-type]
    x = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(scale.normalised(x)[0, :, 0, 0], torch.tensor([0.5 / 3, 4.0, -1 / 1.5]) * 0.5)


def test_weights_without_the_statistics_are_refused(by_channel: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(by_channel["flux2"], tmp_path / "copy")
    file = copy / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith("bn.")}, file)
    with pytest.raises(UserError, match=r"has no bn\.running_mean and bn\.running_var, by which its latents are norm"):
        registry.describe(registry.resolve_latents(str(copy)), resolution=64)
