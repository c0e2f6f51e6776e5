"""The encoder inside a diffusers AutoencoderRAE: what is stored of it, that its decoder undoes it, what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import PrecomputeConfig
from pipeline.encoders import registry
from pipeline.encoders.vae import read_geometry
from pipeline.encoders.weights import file_sha256
from pipeline.plan import GroupPlan, plan_groups
from storage import StoreLayout, UserError
from storage.base.extras import what_to_install
from storage.final_norm import PLAIN
from storage.identity import FeaturesIdentity
from tests.pipeline.encoding import encode_store
from tests.pipeline.hub import empty_cache, put_in_cache
from tests.trainer.runs import micro
from trainer.data.feature_latents import read_latents
from trainer.data.groups import TrainingData, open_data
from trainer.evaluation.generate.decode import decoder_of, load_decoder, to_decode
from trainer.run.latent_map import map_of

pytest.importorskip("transformers")

CPU = torch.device("cpu")
PIXELS, WIDTH, SIDE = 64, 64, 4
SIZES = {"dinov2": {"encoder_patch_size": 14, "encoder_input_size": 56}, "mae": {"encoder_patch_size": 16,
         "encoder_input_size": 64}}  # fmt: skip
LATENTS: dict[str, Any] = {"data.latents": "features/tiny-rae", "model.kind": "rit", "model.patch": 1,
                           "model.class_token": False, "loss.projection_weight": (0.0,)}  # fmt: skip


def autoencoder(folder: Path, kind: str = "dinov2", **changes: Any) -> Any:
    """One with random weights and statistics, saved and loaded by diffusers."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    made = AutoencoderRAE(
        **{
            "encoder_type": kind, "encoder_hidden_size": WIDTH, "encoder_num_hidden_layers": 1, "patch_size": 16,
            "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 48, "latents_mean": torch.randn(WIDTH, SIDE, SIDE),
            "latents_std": torch.rand(WIDTH, SIDE, SIDE) + 0.5, **SIZES[kind], **changes,
        }
    )  # fmt: skip
    made.save_pretrained(folder)
    return AutoencoderRAE.from_pretrained(folder, low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rae") / "tiny-rae"
    autoencoder(path)
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth ones."""
    small = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(small, PIXELS, mode="bicubic").clamp(0, 1)
    return (large * 255).byte().permute(0, 2, 3, 1).numpy()


def planned(folder: Path, dtype: str = "float16", **changes: Any) -> GroupPlan:
    settings: dict[str, Any] = {"latents": str(folder), "features": "none", "resolution": PIXELS}
    config = PrecomputeConfig(data=str(folder), store=str(folder), **{**settings, "features_dtype": dtype, **changes})
    layout = StoreLayout(n_rows=6, views=("original",), resolution=config.resolution, shard_rows=6)
    (plan,) = plan_groups(config, layout, "0" * 64)
    return plan


def stored(folder: Path, root: Path, images: np.ndarray, dtype: str = "float16") -> TrainingData:
    """The group that stage one makes, as a run opens it."""
    encode_store(root / "store", [planned(folder, dtype)], images)
    return open_data(micro(root / "store", root / "run", **LATENTS))


@pytest.mark.parametrize("kind", SIZES)
def test_what_is_stored_is_decoded_as_the_autoencoder_does(kind: str, images: np.ndarray, tmp_path: Path) -> None:
    """Image → stage one → what a run reads and normalises → pixels, against diffusers' own `encode` and `decode`."""
    folder = tmp_path / "tiny-rae"
    model = autoencoder(folder, kind)
    data = stored(folder, tmp_path, images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        z = model.encode(x).latent
        want: Tensor = model.decode(z).sample
    config = micro(tmp_path / "store", tmp_path / "run", **LATENTS, **{"data.latent_statistics": folder})
    scale = map_of(config, data, tmp_path / "run")
    latents = scale.normalised(read_latents(data.latents, np.arange(6)).float())
    assert latents.shape == (6, WIDTH, SIDE, SIDE)
    torch.testing.assert_close(latents, z, atol=4e-3, rtol=0)  # tokens as float16: half of 2⁻⁹ between 2 and 4
    decoder = load_decoder(str(folder), CPU, of=data)
    with torch.no_grad():
        pixels = decoder.decode(to_decode(latents, scale, data))  # type: ignore[operator]
        exactly = decoder.decode(model._denormalize_latents(z))  # type: ignore[operator]
    torch.testing.assert_close((exactly + 1) / 2, want, atol=1e-5, rtol=0)
    assert want.std() > 0.1
    assert ((pixels + 1) / 2 - want).square().mean().sqrt() < 1e-4
    data.close()


def test_it_is_a_features_group_that_names_its_weights_and_its_decoder(folder: Path) -> None:
    plan = planned(folder, "int8")
    identity = plan.identity
    assert isinstance(identity, FeaturesIdentity)
    assert plan.layout.path == "features/tiny-rae"
    assert identity.encoder == "diffusers.AutoencoderRAE.dinov2_reg"
    assert identity.weights_sha256 == file_sha256(folder / "diffusion_pytorch_model.safetensors")
    assert identity.preprocessing == (
        "x/255, bicubic 64->56 without antialias, mean [0.485, 0.456, 0.406] std [0.229, 0.224, 0.225]"
    )
    assert (identity.layer, identity.tokens, identity.token_grid, identity.width) == (PLAIN, "patch", (4, 4), WIDTH)
    assert {array.name for array in plan.layout.arrays} == {"patches", "scale"}
    assert registry.provenance(plan.spec)["decoder"] == str(folder)


def test_the_group_says_what_decodes_it(folder: Path, images: np.ndarray, tmp_path: Path) -> None:
    data = stored(folder, tmp_path, images, "int8")
    config = micro(tmp_path / "store", tmp_path / "run", **LATENTS)
    assert decoder_of(data, config) == str(folder)
    data.close()


def test_statistics_of_an_autoencoder_without_any_are_one_line(
    images: np.ndarray, tmp_path: Path, folder: Path
) -> None:
    bare, by_channel = tmp_path / "tiny-rae", tmp_path / "by-channel"
    autoencoder(bare, latents_mean=None, latents_std=None)
    data = stored(bare, tmp_path, images)

    def mapped(where: Path) -> Any:
        config = micro(tmp_path / "store", tmp_path / "run", **LATENTS, **{"data.latent_statistics": where})
        return map_of(config, data, tmp_path / "run")

    with pytest.raises(UserError, match=r"is of an AutoencoderRAE without statistics; leave --data.latent-statistics"):
        mapped(bare)
    autoencoder(by_channel, latents_mean=torch.ones(WIDTH, 1, 1), latents_std=torch.full((WIDTH, 1, 1), 2.0))
    scale = mapped(by_channel)
    assert isinstance(scale.scale, Tensor)
    torch.testing.assert_close(scale.scale, torch.full((1, WIDTH, 4, 4), 1 / 2.00001))
    data.close()


def test_a_hub_id_is_what_its_configuration_says(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group, whether the autoencoder is named by a folder or by a hub id, whose decoder is the hub's."""
    cache = empty_cache(tmp_path / "hub", monkeypatch)
    with pytest.raises(UserError, match="weights of VAE org/rae/xl are neither in the Hugging Face cache"):
        planned(folder, latents="org/rae/xl")
    for file in folder.iterdir():
        put_in_cache(cache, "org/rae", file, f"xl/{file.name}")
    plan = planned(folder, latents="org/rae/xl")
    assert plan.layout.path == "features/org--rae--xl"
    assert plan.spec.decoder == "org/rae/xl"
    assert dataclasses.replace(plan.identity, name="tiny-rae") == planned(folder).identity
    pixels = torch.zeros(1, PIXELS, PIXELS, 3, dtype=torch.uint8)
    named, of_folder = (registry.load(each.spec, resolution=PIXELS, device=CPU) for each in (plan, planned(folder)))
    assert torch.equal(named.encode(pixels)["patches"], of_folder.encode(pixels)["patches"])


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(says: str, where: Path = folder, **changes: Any) -> None:
        with pytest.raises(UserError, match=says) as caught:
            planned(where, **changes)
        assert "\n" not in str(caught.value)

    refused("tiny-rae decodes to 64 px; pass --resolution 64, got 128", resolution=128)
    settings = json.loads((folder / "config.json").read_text())
    for name, change, says in (
        ("kind", {"encoder_type": "clip"}, "has an encoder clip; encoders of an AutoencoderRAE are dinov2, siglip2, "),
        ("size", {"encoder_input_size": 57}, "encoder_input_size 57 is no multiple of encoder_patch_size 14; copy"),
        ("width", {"encoder_hidden_size": "wide"}, r"config.json: encoder_hidden_size"),
        ("list", {"encoder_type": ["dinov2"]}, r"config.json: encoder_type is damaged"),
        ("mean", {"encoder_norm_mean": 0.5}, r"config.json: encoder_norm_mean is damaged"),
        ("std", {"encoder_norm_std": [0.5, "x", 0.5]}, r"config.json: encoder_norm_std is damaged"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        (broken / "diffusion_pytorch_model.safetensors").write_bytes(
            (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        )
        (broken / "config.json").write_text(json.dumps(settings | change))
        refused(says, broken)
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    for file in folder.iterdir():
        (deeper / file.name).write_bytes(file.read_bytes())
    (deeper / "config.json").write_text(json.dumps(settings | {"encoder_num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"lacks \d+ weights of its AutoencoderRAE, such as encoder\."):
        registry.load(planned(deeper).spec, resolution=PIXELS, device=CPU)
    with pytest.raises(UserError, match=r"whose latents are its encoder's tokens: --latents \S+tiny-rae stores these"):
        read_geometry(folder)  # which is asked of autoencoders only
    assert planned(folder, latents="org/rae", latents_weights=str(folder)).layout.path == "features/org--rae"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError) as lacking:
        planned(folder)
    told = what_to_install(lacking.value, "repa-pipeline")
    assert str(told) == "this needs the package transformers; pip install '.[rae]' in this project's folder"
