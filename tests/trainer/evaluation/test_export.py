"""Exports load where they are meant to, and draw our sampler's images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.encoders.tiny import TINY_VAE
from storage.base.console import EXIT_OK
from storage.base.errors import UserError
from tests.trainer.evaluation.conftest import MICRO
from trainer.__main__ import main
from trainer.config.command_line import train_config
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.evaluation.export import export as exporting
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.decode import decode_latents, load_decoder
from trainer.evaluation.generate.draw import draw_latents
from trainer.loop import random_keys
from trainer.loop.train import train
from trainer.run.checkpoint import latest_checkpoint
from trainer.run.opened import OpenRun, load_model, open_run

TOLERANCE = 1e-3
STEPS = {"sit": 5, "dit": 9}  # with 9, one of the steps that DiT visits ends in a half
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sit", "dit"])
def run(request: pytest.FixtureRequest, micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of either kind whose averaged weights are random, so that no layer is as it was initialised."""
    path = tmp_path_factory.mktemp("exported") / request.param
    if request.param == "sit":
        shutil.copytree(micro_run, path)
    else:
        store = open_run(micro_run).config.store
        train(train_config({**MICRO, "preset": "dit-tiny-2", "steps": "1", "store": store, "run": str(path)}))
    checkpoint = latest_checkpoint(path)
    assert checkpoint is not None
    generator = torch.Generator().manual_seed(0)
    weights = load_file(checkpoint / "ema.safetensors")
    for name, weight in weights.items():
        if name != "pos_embed":
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    save_file(weights, checkpoint / "ema.safetensors")
    return path


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenRun:
    """The run, its latents' decoder named as a precompute would have named it."""
    found = open_run(run)
    found.data.close()
    attributes = {**found.data.latents.attributes, "provenance": {"decoder": str(TINY_VAE)}}
    object.__setattr__(found.data.latents, "attributes", attributes)
    return found


@pytest.fixture(scope="module")
def folder(opened: OpenRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported pipeline."""
    out = tmp_path_factory.mktemp("pipelines") / opened.path.name
    checkpoint = latest_checkpoint(opened.path)
    assert checkpoint is not None
    out.mkdir()
    exporting.write_diffusers(opened, load_file(checkpoint / "ema.safetensors"), 3, out)
    return out


@pytest.fixture(scope="module")
def pipeline(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loaded as a stranger would load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def ours(opened: OpenRun, images: torch.Tensor, **sample: object) -> torch.Tensor:
    """Latents by our sampler, as `generate` draws them."""
    checkpoint = latest_checkpoint(opened.path)
    assert checkpoint is not None
    model = load_model(opened, checkpoint, "ema", CPU)
    kind = opened.geometry.kind
    recipe: TrainConfig = override(
        opened.config,
        {"sample.sampler": "ode" if kind == "sit" else "ddpm", **{f"sample.{k}": v for k, v in sample.items()}},
    )
    with torch.inference_mode():
        return draw_latents(model, images, images % opened.geometry.n_classes, opened.geometry, recipe, 0)


@pytest.mark.parametrize(
    "guiding",
    [
        {"guidance": 1.0},
        {"guidance": 2.0},
        {"guidance": 3.0, "guidance_low": 0.25, "guidance_high": 0.7, "guidance_channels": 3},
    ],
    ids=["conditional", "guided", "interval"],
)
def test_latents_and_pictures_agree_with_our_sampler(
    opened: OpenRun, pipeline: Any, monkeypatch: pytest.MonkeyPatch, guiding: dict[str, Any]
) -> None:
    steps = STEPS[opened.geometry.kind]
    images = torch.arange(4)
    shape = (opened.geometry.channels, opened.geometry.input_size, opened.geometry.input_size)
    expected = ours(opened, images, steps=steps, **guiding)
    step_noise = iter(random_keys.normal(0, "sample", i, images, shape) for i in range(1, steps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(step_noise))
    pipeline.register_to_config(**{"guidance_low": 0.0, "guidance_high": 1.0, "guidance_channels": 0, **guiding})
    call = {
        "class_labels": (images % opened.geometry.n_classes).tolist(),
        "num_inference_steps": steps,
        "latents": random_keys.normal(0, "sample", 0, images, shape),
    }
    latents = pipeline(**call, output_type="latent").images
    assert expected.std() > 0.5
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    if guiding["guidance"] == 1:
        step_noise = iter(random_keys.normal(0, "sample", i, images, shape) for i in range(1, steps))
        pictures = pipeline(**call, output_type="np").images
        pixels = decode_latents(expected / opened.scale.scale + opened.scale.shift, load_decoder(str(TINY_VAE), CPU))
        assert np.abs(pictures - pixels / 255).max() < TOLERANCE + 0.5 / 255  # ours are rounded to 8 bits


def test_guidance_and_interval_matter(opened: OpenRun) -> None:
    images, steps = torch.arange(2), STEPS[opened.geometry.kind]
    drawn = [
        ours(opened, images, steps=steps, guidance=1.0),
        ours(opened, images, steps=steps, guidance=2.0),
        ours(opened, images, steps=steps, guidance=2.0, guidance_high=0.5),
    ]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (drawn[a] - drawn[b]).abs().max() > 10 * TOLERANCE


def test_stock_frequencies_would_draw_other_images(opened: OpenRun, pipeline: Any) -> None:
    def draw(shift: int) -> torch.Tensor:
        for block in pipeline.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
        call = {"class_labels": [0, 1], "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    stock, right = draw(1), draw(0)
    # SiT's times end at 1, where the frequencies still agree; DiT's at 999.
    assert (right - stock).abs().max() > (2 * TOLERANCE if opened.geometry.kind == "dit" else 1e-5)


def test_the_folder_says_what_it_is(folder: Path, opened: OpenRun) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert f"| preset | {opened.config.preset} |" in card
    assert f"A class-conditional {opened.config.preset[:3].title().replace('t', 'T')} trained with" in card
    vanilla = override(opened.config, {"data.features": (), "loss.projection_weight": (0.0,)})
    assert "trained without" in exporting.model_card(dataclasses.replace(opened, config=vanilla), 3, "vae")
    assert DiTPipeline.__name__ not in card


@pytest.mark.parametrize(
    ("decoder", "loaded"),
    [
        ("stabilityai/sd-vae-ft-ema", 'vae=AutoModel.from_pretrained("stabilityai/sd-vae-ft-ema"))'),
        ("org/pipeline/vae", 'vae=AutoModel.from_pretrained("org/pipeline", subfolder="vae"))'),
        ("", "vae=…)"),  # as of latents that were imported
    ],
)
def test_a_vae_that_is_not_here_is_named_and_not_copied(
    opened: OpenRun, tmp_path: Path, decoder: str, loaded: str
) -> None:
    attributes = {**opened.data.latents.attributes, "provenance": {"decoder": decoder} if decoder else {}}
    data = dataclasses.replace(opened.data)
    latents = object.__new__(type(opened.data.latents))
    latents.__dict__.update(opened.data.latents.__dict__)
    object.__setattr__(latents, "attributes", attributes)
    object.__setattr__(data, "latents", latents)
    checkpoint = latest_checkpoint(opened.path)
    assert checkpoint is not None
    exporting.write_diffusers(
        dataclasses.replace(opened, data=data), load_file(checkpoint / "ema.safetensors"), 3, tmp_path
    )
    assert not (tmp_path / "vae").exists()
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    assert loaded in (tmp_path / "README.md").read_text()


def test_one_file_of_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    assert export(run, "safetensors", out, "latest") == [out]
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    expected, found = load_file(checkpoint / "ema.safetensors"), load_file(out / "ema.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with safe_open(out / "ema.safetensors", "pt") as file:
        assert file.metadata()["model.depth"] == "3"
    with pytest.raises(UserError, match="is there already"):
        export(run, "safetensors", out, "latest")


def test_the_command_is_not_silent(micro_run: Path, tmp_path: Path, waits: list[str]) -> None:
    assert main(["export", str(micro_run), "--to", "safetensors", "--out", str(tmp_path / "out")]) == EXIT_OK
    assert waits[2:] == ["loading PyTorch", "reading weights, writing them for safetensors"]


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"half"), Path.unlink], ids=["damaged", "missing"])
def test_weights_that_are_not_whole_are_one_clear_line(micro_run: Path, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(micro_run, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-0000003" / "ema.safetensors")
    for to in ("safetensors", "diffusers"):
        with pytest.raises(UserError, match=r"ema.safetensors is damaged or missing .*another --checkpoint"):
            export(tmp_path / "run", to, tmp_path / "out", "latest")
    assert not (tmp_path / "out").exists()


def test_what_diffusers_cannot_be_is_refused(opened: OpenRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no query and key norm"):
        exporting.transformer_settings(dataclasses.replace(opened.geometry, qk_norm=True))
    checkpoint = latest_checkpoint(opened.path)
    assert checkpoint is not None
    weights = load_file(checkpoint / "ema.safetensors")
    with pytest.raises(UserError, match="position embedding of their own"):
        exporting.renamed({**weights, "pos_embed": weights["pos_embed"] + 1}, opened.geometry)
    with pytest.raises(UserError, match="is not a run"):
        export(tmp_path, "diffusers", None, "latest")
    assert not list(tmp_path.iterdir())
