"""Protocols beside the published settings, option by option, and what `generate` makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.encoders import inception
from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.evaluation.generate.decode import to_uint8
from trainer.evaluation.generate.generate import generate
from trainer.evaluation.generate.image_files import image_path, read_image
from trainer.evaluation.generate.noted import read_noted
from trainer.evaluation.options import GenerateConfig
from trainer.evaluation.protocols import PROTOCOLS, of_sample, protocol_named
from trainer.objectives import OBJECTIVES
from trainer.objectives.sampling import calls_of, noise_levels, sample

SD, ADM_FILE = "stabilityai/sd-vae-ft-ema", "VIRTUAL_imagenet256_labeled.npz"
# What all have: 50,000 images of ImageNet's 1,000 classes at 256 px, held by the Inception of 2015-12-05 against ADM's
# statistics of its training set. Of a class token, the guidance of the image, and draws of its own.
COMMON: dict[str, Any] = {
    "n": 50_000, "resolution": 256, "classes": 1000, "heun": False, "shift": 1, "dimension": 0, "end": 0,
    "guidance_low": 0, "guidance_channels": 0, "guidance_class": -1, "guidance_class_low": -1,
    "guidance_class_high": -1, "guidance_by": "null label", "class_noise": "own", "reference": ADM_FILE,
    "n_reference": 0, "extractor": "inception", "extractor_sha256": "6726825d", "extractor_vector": "pool_3",
    "extractor_resize": "TensorFlow 1 bilinear to 299, (x-128)/128",
}  # fmt: skip
# arXiv 2410.06940, table 4 and appendix D; REPA's README.md, section 4: --mode=sde --num_steps=250 --cfg-scale=1.8
# --guidance_high=0.7; generate.py: torch.randint, --tf32, --vae ema, clamp(255 · (x + 1) / 2) to uint8
REPA = COMMON | {
    "kind": "sit", "ema_decay": 0.9999, "labels": "random", "sampler": "sde", "steps": 250, "guidance": 1.8,
    "guidance_high": 0.7, "precision": "tf32", "rounding": "truncate", "decoder": SD,
}  # fmt: skip
# arXiv 2507.01467; REG's eval.sh: NUM_STEP=250 CFG_SCALE=2.3 CLS_CFG_SCALE=2.3 GH=0.85 --mode=sde; generate.py: as REPA
REG = COMMON | {
    "kind": "sit", "ema_decay": 0.9999, "labels": "random", "sampler": "sde", "steps": 250, "guidance": 2.3,
    "guidance_high": 0.85, "guidance_class": 2.3, "precision": "tf32", "rounding": "truncate", "decoder": SD,
}  # fmt: skip
# arXiv 2501.01423; LightningDiT's configs/reproductions/…_800ep_cfg.yaml: euler, 250 points, cfg 6.7 from 0.125 of the
# data's time, timestep_shift 0.3; inference.py: torch.randint, allow_tf32; vavae.py: clamp(127.5 · x + 128) to uint8
LIGHTNINGDIT = COMMON | {
    "kind": "lightningdit", "ema_decay": 0.9999, "labels": "random", "sampler": "ode", "steps": 250 - 1,
    "shift": 1 / 0.3, "guidance": 6.7, "guidance_high": 1 - 0.125, "guidance_channels": 3, "precision": "tf32",
    "rounding": "round", "decoder": "hustvl/vavae-imagenet256-f16d32-dinov2",
}  # fmt: skip
# arXiv 2510.11690; RAE's DiTDHXL-DINOv2-B_AG.yaml: euler, 50 points, autoguidance 1.42, latents 768 × 16 × 16, EMA
# 0.9995; transport: to 0.999 of the data's time; sample_ddp.py: --label-sampling equal, --tf32, mul(255) to uint8
RAE = COMMON | {
    "kind": "ditdh", "ema_decay": 0.9995, "labels": "balanced", "sampler": "ode", "steps": 50 - 1, "shift": 0,
    "dimension": 768 * 256, "end": 1 - 0.999, "guidance": 1.42, "guidance_high": 1, "guidance_by": "weaker model",
    "precision": "tf32", "rounding": "truncate", "decoder": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
}  # fmt: skip
# arXiv 2605.21981; RiT's scripts/eval.sh: heun, 25 steps, time_shift (of latents 384 × 16 × 16), CFG=3.7 in the data's
# time from 0.1 to 0.98, --coupled_noise, --gen_precision fp32; denoiser.py: cfg_cls is cfg; engine.py: labels in turn,
# ema_params1 (0.9999), np.round(clip(255 · x)), fid_stats/imagenet256_stats.npz
RIT = COMMON | {
    "kind": "rit", "ema_decay": 0.9999, "labels": "balanced", "sampler": "ode", "steps": 25, "heun": True, "shift": 0,
    "dimension": 384 * 256, "guidance": 3.7, "guidance_low": 1 - 0.98, "guidance_high": 1 - 0.1, "class_noise": "mean",
    "precision": "fp32", "rounding": "round", "decoder": "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08",
    "reference": "imagenet256_stats.npz",
}  # fmt: skip
# arXiv 2105.05233; guided-diffusion's README.md: --timestep_respacing 250 --use_fp16 True; image_sample.py: th.randint,
# ((x + 1) · 127.5) to uint8; image_train.py: --ema_rate 0.9999. It draws pixels, and guides by a classifier
ADM = COMMON | {
    "kind": "dit", "ema_decay": 0.9999, "labels": "random", "sampler": "ddpm", "steps": 250, "guidance": 1,
    "guidance_high": 1, "precision": "fp16", "rounding": "truncate", "decoder": "",
}  # fmt: skip
UNGUIDED = {"guidance": 1, "guidance_by": "null label"}
# Of the papers' figures and the options of their public scripts, read by hand; the data's times as noise levels.
PUBLISHED: dict[str, dict[str, Any]] = {
    "repa": REPA,
    "repa-unguided": REPA | UNGUIDED,  # arXiv 2410.06940, tables 2 and 3
    "reg": REG,
    "reg-unguided": REG | UNGUIDED,  # arXiv 2507.01467
    "lightningdit": LIGHTNINGDIT,
    # arXiv 2501.01423; …_64ep_cfg.yaml: cfg 10 from 0.10 of the data's time
    "lightningdit-64ep": LIGHTNINGDIT | {"guidance": 10, "guidance_high": 1 - 0.10},
    "lightningdit-unguided": LIGHTNINGDIT | UNGUIDED,  # arXiv 2501.01423
    "rae": RAE,
    "rae-unguided": RAE | UNGUIDED,  # arXiv 2510.11690; DiTDHXL-DINOv2-B.yaml
    "rit": RIT,
    "rit-unguided": RIT | UNGUIDED,  # arXiv 2605.21981; README.md: CFG=1.0 scripts/eval.sh
    "adm": ADM,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_setting_is_the_published_one(name: str) -> None:
    """Of every field: a setting that is added needs a line above."""
    protocol = PROTOCOLS[name]
    assert set(PUBLISHED) == set(PROTOCOLS)
    found = dataclasses.asdict(protocol)
    assert (found.pop("name"), "arXiv 2" in found.pop("source")) == (name, True)
    assert found == {n: pytest.approx(v) if isinstance(v, float) else v for n, v in PUBLISHED[name].items()}


def test_inception_is_what_the_pipeline_describes_images_by(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    described, protocol = inception.describe(tmp_path / "weights.pth"), PROTOCOLS["repa"]
    assert described.name == protocol.extractor
    assert (described.vector, described.preprocessing) == (protocol.extractor_vector, protocol.extractor_resize)
    assert inception._expected_sha256() == protocol.extractor_sha256


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("repa", "sit-xl-2"),
        ("reg", "sit-xl-2-reg"),
        ("lightningdit", "lightningdit-xl-1"),
        ("rae", "ditdh-xl-1"),
        ("rae", "ditdh-s-1"),
        ("rit", "rit-xl-1"),
        ("adm", "dit-xl-2"),
    ],
)
def test_a_preset_draws_labels_as_the_release_of_its_method(name: str, of: str) -> None:
    assert preset(of).sample.labels == PROTOCOLS[name].labels


@pytest.mark.parametrize(
    ("name", "of", "calls", "guided", "levels"),
    [
        ("repa", "sit-xl-2", 250, 172, (1.0, 0.04, 0.0)),  # 1 − 0.96 i / 249 is at most 0.7 from i = 78 to 249
        ("reg", "sit-xl-2-reg", 250, 211, (1.0, 0.04, 0.0)),
        ("lightningdit", "lightningdit-xl-1", 249, None, (1.0, None, 0.0)),
        ("rae", "ditdh-xl-1", 49, 49, (1.0, None, 6.93 * 0.001 / (1 + 5.93 * 0.001))),
        # 4.9 s / (1 + 3.9 s), s = 1 − i / 25, lies in (0.02, 0.9) at i = 9 to 24, of two slopes each
        ("rit", "rit-xl-1", 49, 32, (1.0, None, 0.0)),
        ("rit-unguided", "rit-xl-1", 49, 0, (1.0, None, 0.0)),
        ("adm", "dit-xl-2", 250, 0, (999 / 1000, 0.0, 0.0)),
    ],
)
def test_the_sampler_asks_the_model_as_often_as_the_published_one(
    name: str, of: str, calls: int, guided: int | None, levels: tuple[float, float | None, float]
) -> None:
    config = override(preset(of), of_sample(protocol_named(name))).sample
    config = dataclasses.replace(config, shift=config.shift or {"rae": 6.93}.get(name, 4.90))
    found = calls_of(config, OBJECTIVES[preset(of).model.kind], class_token=preset(of).model.class_token)
    visited = noise_levels(config)
    assert found.total == calls
    assert guided is None or found.guided == guided
    assert (visited[0], visited[-1]) == pytest.approx((levels[0], levels[2]), abs=1e-6)
    assert levels[1] is None or visited[-2] == pytest.approx(levels[1])


@pytest.mark.parametrize("name", ["repa", "lightningdit", "rae-unguided"])
def test_calls_are_counted_as_the_sampler_makes_them(name: str) -> None:
    sample_config = dataclasses.replace(override(preset("sit-xl-2"), of_sample(protocol_named(name))).sample, shift=2.0)
    batches: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return torch.zeros_like(x)

    x = torch.zeros(1, 4, 1, 1)
    sample(model, x, torch.zeros(1, dtype=torch.long), 1, sample_config, "linear", lambda step: torch.zeros_like(x))
    found = calls_of(sample_config, OBJECTIVES["sit"], class_token=False)
    assert (found.total, found.guided) == (len(batches), batches.count(2))


def test_a_protocol_guides_a_class_token_where_it_guides_the_image() -> None:
    """Whatever interval the run was saved with."""
    saved = override(
        preset("sit-xl-2-reg"), {"sample.guidance_class_low": 0.5, "sample.guidance_class_high": 0.6}
    )  # fmt: skip
    assert override(saved, of_sample(protocol_named("reg"))).sample.class_interval == (0.0, 0.85)


def test_truncation_is_half_a_step_darker_and_rounding_is_not() -> None:
    pixels = torch.linspace(-1.1, 1.1, 100_001)
    exact = (pixels.clamp(-1, 1) + 1) * 127.5
    truncated, rounded = (to_uint8(pixels, how).double() for how in ("truncate", "round"))  # type: ignore[arg-type]
    assert (truncated - exact).mean() == pytest.approx(-0.5 * 2 / 2.2, abs=0.01)
    assert abs((rounded - exact).mean()) < 0.01
    assert torch.equal(truncated, torch.clamp(255 * (pixels + 1) / 2, 0, 255).to(torch.uint8).double())  # REPA's
    halves_up = torch.clamp(127.5 * pixels + 128, 0, 255).to(torch.uint8).double()  # LightningDiT's
    assert (rounded != halves_up).double().mean() < 1e-3


def drawn(run: Path, where: Path, **options: Any) -> Path:
    config = GenerateConfig(run=run, n=3, out=where, batch=3, vae=str(TINY_VAE), device="cpu", **options)
    folder, *_ = generate(config)
    return folder


def test_a_protocol_sets_all_at_once_and_what_is_named_goes_before_it(micro_run: Path, tmp_path: Path) -> None:
    card = read_noted(drawn(micro_run, tmp_path / "a", protocol="repa", steps=4))
    assert (card.protocol, card.steps, card.sampler, card.labels, card.rounding) == (
        *("repa", 4, "euler-maruyama", "random", "truncate"),
    )
    assert (card.guidance, card.guidance_low, card.guidance_high, card.guidance_by) == (1.8, 0, 0.7, "null label")
    assert (card.equation, card.calls, card.last_step_from, card.times_end) == ("sde", 4, 0.04, 0)
    assert (card.weights, card.ema_decay, card.precision) == ("ema", 0.5, "fp32 on cpu")
    assert card.decoder_sha256 is not None
    same = drawn(
        micro_run, tmp_path / "b", sampler="sde", steps=4, guidance=1.8, guidance_high=0.7, labels="random",
        rounding="truncate", guidance_low=0.0, guidance_channels=0, shift=1.0,
    )  # fmt: skip
    for i in range(3):
        assert (read_image(image_path(same, i)) == read_image(image_path(tmp_path / "a", i))).all()
    rounded = drawn(micro_run, tmp_path / "c", protocol="repa", steps=4, rounding="round")
    difference = read_image(image_path(rounded, 0)).astype(int) - read_image(image_path(same, 0))
    assert set(np.unique(difference)) == {0, 1}
    unguided = read_noted(drawn(micro_run, tmp_path / "d", protocol="repa-unguided", steps=4))
    assert (unguided.guidance, unguided.guidance_high, unguided.guidance_by, unguided.guided_calls) == (
        *(1, 1, "nothing", 0),
    )


def test_the_page_has_every_protocol_and_the_largest_seed_is_noted(micro_run: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    assert [name for name in PROTOCOLS if name not in page] == []
    folder, *_ = generate(
        GenerateConfig(
            run=micro_run, n=1, out=tmp_path / "a", batch=1, steps=1, seed=2**63 - 1, vae=str(TINY_VAE), device="cpu"
        )
    )
    assert read_noted(folder).seed == 2**63 - 1


def test_a_protocol_that_cannot_be_is_refused(micro_run: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"protocol": "rapa"}, "--protocol rapa is not known; did you mean repa"),
        ({"protocol": "adm"}, "ddpm cannot draw from --model.kind sit"),
        ({"protocol": "rae"}, "guides away from a weaker model; pass --weaker RUN, or take --protocol rae-unguided"),
    ):
        with pytest.raises(UserError, match=message):
            drawn(micro_run, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_default_folders_of_other_settings_are_others(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    base = GenerateConfig(run=run, n=1, batch=1, steps=2, vae=str(TINY_VAE), device="cpu")
    changes: list[dict[str, Any]] = [{}, {"protocol": "repa"}, {"rounding": "truncate"}, {"guidance_high": 0.5}]
    assert len({generate(dataclasses.replace(base, **each))[0] for each in changes}) == 4


def test_images_of_before_cards_are_read_and_gone_on_with(micro_run: Path, tmp_path: Path) -> None:
    """What their settings do not say is unknown, and stays so when images are added."""
    folder = drawn(micro_run, tmp_path / "a", steps=4)
    settings = json.loads((folder / "settings.json").read_text())
    whole = read_noted(folder)
    old = {name: value for name, value in settings.items() if name not in ("card", "rounding")}
    (folder / "settings.json").write_text(json.dumps(old))
    before = read_noted(folder)
    assert (before.step, before.steps, before.calls, before.rounding, before.weights) == (3, 4, 4, "round", "ema")
    assert (before.ema_decay, before.decoder_sha256, before.guided_calls, before.class_noise) == (None,) * 4
    generate(GenerateConfig(run=micro_run, n=5, out=folder, batch=3, steps=4, vae=str(TINY_VAE), device="cpu"))
    after = read_noted(folder)
    assert after.decoder_sha256 is None
    assert after.ema_decay == whole.ema_decay
    generate(GenerateConfig(run=micro_run, n=6, out=folder, batch=3, steps=4, vae=str(TINY_VAE), device="cpu"))
    assert read_noted(folder).decoder_sha256 is None
    (folder / "settings.json").write_text(json.dumps(settings | {"card": whole.plain() | {"version": 2}}))
    with pytest.raises(UserError, match="version"):
        read_noted(folder)
    (folder / "settings.json").write_text("{}")
    assert read_noted(folder).of_another_program
    decoded_otherwise = settings | {"card": whole.plain() | {"decoder_sha256": "0" * 64}}
    (folder / "settings.json").write_text(json.dumps(decoded_otherwise))
    with pytest.raises(UserError, match="decoded with other weights"):
        drawn(micro_run, folder, steps=4)
