"""Autoencoders of diffusers: what is stored, of posteriors and of deterministic latents, from where they may lie."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from pipeline.encoders import registry, vae
from pipeline.encoders.catalogue import VAES
from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from tests.pipeline.autoencoders import CPU, KL, WAN, encode, pictures, save, to_input
from tests.pipeline.hub import empty_cache, put_in_cache
from trainer.evaluation.generate.decode import load_decoder

SIXTEEN: dict[str, Any] = {  # as SD3 and Flux have it: no convolution behind the encoder, a shift
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
DC: dict[str, Any] = {
    "latent_channels": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "attention_head_dim": 16,
    "scaling_factor": 0.41407,
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seeded random weights in the file format of the published ones, by kind."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("vae")
    made: dict[str, Any] = {
        "posterior": AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.5),
        "sixteen": AutoencoderKL(**KL, **SIXTEEN),
        "dc": AutoencoderDC(**DC),
        "taesd": AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)),
    }
    return {name: save(model, root / name) for name, model in made.items()}


@pytest.mark.parametrize(("name", "channels", "shift"), [("posterior", 4, 0.0), ("sixteen", 16, 0.1159)])
def test_moments_are_the_posterior_mean_and_standard_deviation(
    directories: dict[str, Path], name: str, channels: int, shift: float
) -> None:
    directory = directories[name]
    identity, moments = encode(str(directory), 64)
    assert identity.encoder == "diffusers.AutoencoderKL"
    assert "posterior" not in identity.plain()
    assert (identity.latent_channels, identity.latent_size) == (channels, (16, 16))
    assert identity.latent_scale_factor == {4: 0.5, 16: 0.3611}[channels]
    assert identity.latent_shift_factor == shift
    with torch.inference_mode():
        posterior = AutoencoderKL.from_pretrained(directory).encode(to_input(pictures(3, 64))).latent_dist
    mean, log_variance = posterior.parameters.chunk(2, dim=1)
    wanted = torch.cat([mean, (log_variance / 2).exp()], dim=1)
    np.testing.assert_allclose(moments, wanted.numpy(), atol=2e-3, rtol=2e-3)
    assert (moments[:, channels:] > 0).all()


@pytest.mark.parametrize(("name", "kind"), [("dc", AutoencoderDC), ("taesd", AutoencoderTiny)])
def test_a_deterministic_latent_is_stored_alone_and_the_identity_says_so(
    directories: dict[str, Path], name: str, kind: Any
) -> None:
    identity, moments = encode(str(directories[name]), 64)
    assert identity.posterior is False
    assert identity.stored == "latent, unscaled"
    assert identity.latent_scale_factor == {"dc": 0.41407, "taesd": 1.0}[name]
    assert moments.shape[1] == identity.latent_channels
    with torch.inference_mode():
        encoded = kind.from_pretrained(directories[name]).encode(to_input(pictures(3, 64)))
    wanted = encoded.latent if name == "dc" else encoded.latents
    np.testing.assert_allclose(moments, wanted.numpy(), atol=2e-3, rtol=2e-3)


SD: dict[str, Any] = {  # the published configurations, at full size
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
SANA: dict[str, Any] = {
    **DC,
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
}


@pytest.mark.parametrize(
    ("name", "config", "scale", "shift"),
    [
        ("sd-vae-ft-mse", SD, 0.18215, 0.0),  # its file names no factor; diffusers' default is Stable Diffusion's
        ("sdxl-vae", SD | {"scaling_factor": 0.13025}, 0.13025, 0.0),
        ("sd3-vae", SD | SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0609),
        ("flux-vae", SD | SIXTEEN, 0.3611, 0.1159),
        ("dc-ae-f32c32", SANA, 0.41407, 0.0),
    ],
)
def test_the_published_configurations_have_the_catalogues_geometry(
    tmp_path: Path, name: str, config: dict[str, Any], scale: float, shift: float
) -> None:
    """Full-size architectures, on the meta device."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, known = vae.read_geometry(tmp_path), VAES[name]
    assert (found.channels, found.factor, found.posterior) == (known.channels, known.factor, known.posterior)
    assert (found.scale, found.shift) == (scale, shift)
    assert found == vae.probe(config, config["_class_name"], tmp_path)


@pytest.mark.parametrize(("resolution", "side"), [(256, 64), (512, 128)])
def test_any_multiple_of_the_factor_is_a_resolution(directories: dict[str, Path], resolution: int, side: int) -> None:
    _, moments = encode(str(directories["posterior"]), resolution, n=1)
    assert moments.shape == (1, 8, side, side)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "channels", "factor"), [(SD, 8, 8), (SD | SIXTEEN, 32, 8), (SANA, 32, 32)])
def test_a_whole_autoencoder_at_512(tmp_path: Path, config: dict[str, Any], channels: int, factor: int) -> None:
    kind: Any = AutoencoderDC if config is SANA else AutoencoderKL
    save(kind.from_config(config), tmp_path / "whole")
    _, moments = encode(str(tmp_path / "whole"), 512, n=1)
    assert moments.shape == (1, channels, 512 // factor, 512 // factor)


def test_decoding_gives_pictures_of_unscaled_latents(directories: dict[str, Path]) -> None:
    loaded: Any = registry.load(registry.resolve_latents(str(directories["posterior"])), resolution=64, device=CPU)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    images = loaded.decode(latents)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.uint8)
    with torch.inference_mode():
        decoded = AutoencoderKL.from_pretrained(directories["posterior"]).decode(torch.from_numpy(latents)).sample
    wanted = ((decoded.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - wanted).max() <= 0.51


# Where they lie -------------------------------------------------------------------------------------------------------


def test_a_pipelines_folder_and_the_hubs_cache_are_looked_into(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "some-pipeline"
    (whole / "vae").mkdir(parents=True)
    cache = empty_cache(tmp_path / "hub", monkeypatch)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        file = directories["sixteen"] / name
        (whole / "vae" / name).write_bytes(file.read_bytes())
        put_in_cache(cache, "black-forest-labs/FLUX.1-schnell", file, f"vae/{name}")
        put_in_cache(cache, "someone/vae", file, name)
    identities = [
        registry.describe(registry.resolve_latents(name), resolution=64)
        for name in (str(directories["sixteen"]), str(whole), "flux-vae", "someone/vae")
    ]
    for identity in identities[1:]:
        assert replace(identity, name="") == replace(identities[0], name="")
    assert registry.resolve_latents(str(whole)).decoder == str(whole / "vae")
    assert registry.resolve_latents("flux-vae", weights=whole).weights == whole / "vae"
    assert [identity.name for identity in identities[1:]] == ["some-pipeline", "flux-vae", "someone--vae"]


def test_missing_weights_say_which_folder_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache(tmp_path / "hub", monkeypatch)
    with pytest.raises(UserError, match=r"hf download black-forest-labs/FLUX.1-schnell --include 'vae/\*'"):
        registry.describe(registry.resolve_latents("flux-vae"), resolution=256)
    with pytest.raises(UserError, match=r"hf download stabilityai/sd-vae-ft-mse` and.*--latents-weights"):
        registry.describe(registry.resolve_latents("sd-vae-ft-mse"), resolution=256)
    with pytest.raises(UserError, match=r"must hold config\.json"):
        registry.describe(registry.resolve_latents("sd-vae-ft-mse", weights=tmp_path), resolution=256)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SD | {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "has 3 means and 3 deviations, and the latents 4"),
        (
            SD | {"latents_mean": [0.0] * 4},
            r"config\.json: latents_mean and latents_std is damaged .*; copy the",
        ),
        (SD | {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "channel 0 has mean 0.0 and deviation 0.0"),
        (
            SD | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            r"names latents_mean and a shift_factor of 0\.1, of which only one can be meant",
        ),
        (
            WAN | {"_class_name": "AutoencoderKLWan", "latents_mean": None, "latents_std": None},
            "that names neither a scaling_factor nor latents_mean and latents_std",
        ),
        ({"_class_name": "UNet2DModel"}, "does not encode images"),
        ({"_class_name": "AutoencoderOfTheFuture"}, "does not know"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        vae.read_geometry(tmp_path)


def test_resolutions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="--resolution must be a multiple of 8 for tiny-vae, got 100"):
        registry.describe(registry.resolve_latents(str(TINY_VAE)), resolution=100)


def test_what_float16_cannot_hold_is_an_error_and_not_stored(directories: dict[str, Path], tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(directories["posterior"])
    with torch.no_grad():
        model.quant_conv.weight[:4] *= 1e7
    save(model, tmp_path / "loud")
    loud = registry.load(registry.resolve_latents(str(tmp_path / "loud")), resolution=64, device=CPU)
    with pytest.raises(UserError, match=r"moments of image 0 of a batch are NaN or beyond float16"):
        registry.encode_images(loud, pictures(2, 64))


def test_sdxls_vae_is_refused_in_float16() -> None:
    with pytest.raises(UserError, match="sdxl-vae overflows in float16"):
        registry.resolve_latents("sdxl-vae", precision="fp16")
    with pytest.raises(UserError, match="sdxl-vae overflows in float16"):
        registry.resolve_latents("sdxl-vae:precision=fp16")
    assert registry.resolve_latents("sdxl-vae:precision=bf16", precision="fp16").precision == "bf16"


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_an_autoencoder_s_weights_are_found_under_any_prefix(tmp_path: Path, prefix: str, name: str) -> None:
    state = load_file(TINY_VAE / "diffusion_pytorch_model.safetensors")
    renamed = {prefix + key: value for key, value in state.items()}
    shutil.copyfile(TINY_VAE / "config.json", tmp_path / "config.json")
    (save_file if name.endswith("safetensors") else torch.save)(renamed, tmp_path / name)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = vae.VAE(TINY_VAE, torch.device("cpu")).encode(images)["moments"]
    assert torch.equal(vae.VAE(tmp_path, torch.device("cpu")).encode(images)["moments"], expected)
    decoder = load_decoder(str(tmp_path), torch.device("cpu"))
    assert all(torch.equal(value, state[key]) for key, value in decoder.state_dict().items())


def test_an_autoencoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    state = load_file(TINY_VAE / "diffusion_pytorch_model.safetensors")
    shutil.copyfile(TINY_VAE / "config.json", tmp_path / "config.json")
    save_file({f"other.{key}": value for key, value in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"lacks \d+ weights of its AutoencoderKL, such as"):
        vae.VAE(tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=r"cannot be loaded \(\d+ of its weights are missing\)"):
        load_decoder(str(tmp_path), torch.device("cpu"))
