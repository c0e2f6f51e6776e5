"""Features as latents become pictures by diffusers' AutoencoderRAE, whose decoder alone is loaded; and what follows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storage import open_store
from storage.base.errors import UserError
from storage.final_norm import PLAIN as PLAIN_NORM
from tests.stores import FEATURES
from tests.trainer.feature_stores import DITDH, NORM, RIT, plain_tokens, write
from tests.trainer.runs import micro
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.feature_decoder import load_feature_decoder, require_decoder
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.generate.image_files import image_path, n_written, read_image
from trainer.evaluation.generate.outcome import outcome
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.evaluation.report.page import write_report
from trainer.loop.train import train
from trainer.run.folder import RunFolder
from trainer.run.opened import open_run

ENCODER = "timm.vit_small_patch14_reg4_dinov2.lvd142m"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoded") / "store"
    write(root, plain_tokens() * NORM.weight + NORM.bias, layer="final norm", norm=NORM, encoder=ENCODER)
    return root


def autoencoder(folder: Path, **changes: Any) -> Any:
    """An AutoencoderRAE with random weights, saved; without an encoder, which `transformers` would have."""
    from diffusers import AutoencoderRAE
    from diffusers.models.autoencoders import autoencoder_rae

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder_rae, "_build_encoder", lambda **settings: nn.Linear(2, 2))
        model = AutoencoderRAE(
            **{
                "encoder_hidden_size": 24, "encoder_input_size": 112, "encoder_num_hidden_layers": 1,
                "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 48, "patch_size": 16, "latents_mean": torch.randn(24, 8, 8),
                "latents_std": torch.rand(24, 8, 8) + 0.5, **changes,
            }
        )  # fmt: skip
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rae") / "rae"
    autoencoder(folder)
    return folder


def test_pixels_are_the_autoencoder_s(store: Path, tmp_path: Path) -> None:
    """Of tokens that it would have normalised by its own statistics."""
    model = autoencoder(tmp_path)
    tokens = torch.randn(2, 24, 8, 8)
    group = open_store(store).group(FEATURES)
    with torch.no_grad():
        want: Tensor = 2 * model.decode(model._normalize_latents(tokens)).sample - 1
        pixels = load_feature_decoder(str(tmp_path), group, CPU).decode(tokens)
    assert pixels.shape == (2, 3, 128, 128)
    torch.testing.assert_close(pixels, want, atol=1e-5, rtol=1e-5)
    group.close()


def test_a_decoder_of_other_tokens_is_one_line(store: Path, decoder: Path, tmp_path: Path) -> None:
    group = open_store(store).group(FEATURES)

    def refused(folder: Path, says: str) -> None:
        with pytest.raises(UserError, match=says) as caught:
            load_feature_decoder(str(folder), group, CPU)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "the decoder .* cannot be had")
    autoencoder(tmp_path / "wide", encoder_hidden_size=48)
    refused(
        tmp_path / "wide", r"decodes dinov2 of width 48 on 8×8 tokens, and features/tiny-vit is timm.vit_small_.*, 24"
    )
    autoencoder(tmp_path / "mae", encoder_type="mae")
    refused(tmp_path / "mae", r"decodes mae of width 24 on 8×8 tokens, .*; name a decoder of this encoder")
    for name, change, says in (
        ("kind", {"_class_name": "AutoencoderKL"}, "holds AutoencoderKL, and features are decoded by AutoencoderRAE"),
        ("layers", {"decoder_num_hidden_layers": 3}, r"cannot be loaded \(RuntimeError: Error.* Missing key"),
        ("size", {"patch_size": "x"}, r"cannot be loaded \(ValueError"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in decoder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | change))
        refused(folder, says)
    group.close()


@pytest.mark.parametrize(
    ("kind", "encoder", "fits"),
    [
        ("siglip2", "timm.vit_base_patch16_siglip_256.v2_webli", True),
        ("siglip2", "diffusers.AutoencoderRAE.siglip2", True),
        ("siglip2", "timm.vit_base_patch16_siglip_256.webli", False),
        ("dinov2", "timm.vit_small_patch14_reg4_dinov2", True),
        ("dinov2", "timm.vit_small_patch14_dinov2", False),
        ("dinov2", "diffusers.AutoencoderRAE.dinov2_reg", True),
        ("mae", "timm.vit_large_patch16_224.mae", True),
    ],
)
def test_which_encoders_a_decoder_is_of(tmp_path: Path, kind: str, encoder: str, fits: bool) -> None:
    """SigLIP 2 is not SigLIP, and DINOv2's registers count."""
    write(tmp_path / "store", plain_tokens(8), layer=PLAIN_NORM, encoder=encoder)
    group = open_store(tmp_path / "store").group(FEATURES)
    folder = tmp_path / "decoder"
    autoencoder(folder, encoder_type=kind)
    if fits:
        require_decoder(str(folder), group)
    else:
        with pytest.raises(UserError, match=rf"decodes {kind} of width 24 .*; name a decoder of this encoder"):
            require_decoder(str(folder), group)
    group.close()


@pytest.fixture(scope="module")
def runs(store: Path, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each model, with previews, and a weaker one."""
    root = tmp_path_factory.mktemp("runs")
    common = {"steps": 3, "data.decoder": str(decoder), "log.samples_every": 2, "log.samples": 2, "sample.steps": 2}
    for name, changes in (
        ("rit", {**RIT, "sample.heun": True}),
        ("ditdh", DITDH),
        ("weaker", {**DITDH, "model.depth": 1}),
    ):
        train(micro(store, root / name, **{**common, **changes}))
    return {name: root / name for name in ("rit", "ditdh", "weaker")}


@pytest.mark.parametrize("name", ["rit", "ditdh"])
def test_what_follows_a_training_knows_features(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs[name]
    assert RunFolder(run).preview(2).is_file()
    more: dict[str, Any] = {"class_noise": "mean"} if name == "rit" else {"weaker": runs["weaker"]}
    given = {"run": run, "n": 4, "batch": 2, "steps": 2, "device": "cpu", "guidance": 1.5, **more}
    folder, _ = generate(GenerateConfig(out=tmp_path / "images", **given))
    assert n_written(folder) == 4
    assert read_image(image_path(folder, 0)).shape == (128, 128, 3)
    said = {"rit": "ode (Heun), 2 steps, guidance 1.5,", "ditdh": "2 steps, guidance 1.5 away from a weaker model,"}
    assert said[name] in outcome([folder, tmp_path / "images.png"])
    record = json.loads((folder / "settings.json").read_text())
    assert record["sample.class_noise"] == more.get("class_noise", "own")
    assert ("weaker_sha256" in record) == (name == "ditdh")
    points = sweep(run, SweepConfig(n=20, k=3, device="cpu", batch=8), ["cknna", "probe"])["points"]
    assert [point["block"] for point in points] == ([1, 2] if name == "rit" else [1, 2, 3])  # a head's last
    assert all(0 <= point["probe"] <= 1 for point in points)
    (folder,) = export(run, "safetensors", tmp_path / "safetensors", "latest")
    assert (folder / "latent-statistics.safetensors").read_bytes() == RunFolder(run).latent_statistics.read_bytes()
    with pytest.raises(UserError, match="has features as latents, for which diffusers has no pipeline; export it with"):
        export(run, "diffusers", tmp_path / "diffusers", "latest")
    (page,) = write_report(list(runs.values()), tmp_path / "report.html", "")
    assert name in page.read_text()


def test_features_of_another_encoder_are_not_measured(runs: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path / "other", plain_tokens(), layer="final norm", norm=NORM)
    config = SweepConfig(n=20, k=3, device="cpu", batch=8, store=str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"has other latents than \S+ was trained on \(encoder: timm.vit_small\S* and te"
    ):
        sweep(runs["rit"], config, ["cknna"])


def test_a_weaker_run_of_other_latents_is_one_line(runs: dict[str, Path]) -> None:
    given = GenerateConfig(run=runs["ditdh"], n=2, device="cpu", guidance=1.5, weaker=runs["rit"])
    with pytest.raises(
        UserError, match=r"--weaker \S+ has a state \(1560,\), \S+ has \(24, 8, 8\); name a run like it"
    ):
        generate(given)
    with pytest.raises(
        UserError, match="does not say what decodes it; pass --vae with a folder or hub id of diffusers'"
    ):
        generate(dataclasses.replace(given, run=without_decoder(runs["ditdh"])))


def without_decoder(run: Path) -> Path:
    config = RunFolder(run).config
    config.write_text("\n".join(line for line in config.read_text().splitlines() if " decoder: " not in line) + "\n")
    assert open_run(run).config.data.decoder == ""
    return run
