"""Runs on latents that are normalised channel by channel: imported, trained, resumed, sampled, decoded, exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import safe_open

from storage.__main__ import main as storage
from storage.base.errors import UserError
from storage.reader import open_store
from storage.receipts import read_receipt, write_receipt
from storage.staging import Staging
from tests.storage.test_normalisation import C, lightningdit_folder
from tests.stores import make_store
from tests.trainer.runs import assert_same_run, curve
from trainer.__main__ import main as trainer
from trainer.config.tree import override
from trainer.config.yaml_file import parse_yaml
from trainer.evaluation.generate.decode import decode_latents, load_decoder
from trainer.evaluation.generate.draw import draw_latents
from trainer.evaluation.generate.image_files import image_path, read_image
from trainer.run.checkpoint import latest_checkpoint
from trainer.run.opened import load_model, open_run

CPU = torch.device("cpu")
MICRO = [
    "--device=cpu", "--batch=8", "--model.depth=2", "--model.width=32", "--model.heads=2", "--log.every=1",
    "--log.tensorboard=false", "--data.resolution=0", "--checkpoint.every=1000", "--log.samples=4",
    "--model.align-block=1",
]  # fmt: skip
PRESET = "sit-b-1-vanilla"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LightningDiT's folder; its latents have means up to 3 and deviations up to 5."""
    folder = tmp_path_factory.mktemp("lightningdit") / "vavae"
    lightningdit_folder(folder, counts=(16, 12))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of factor 16 for three channels."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        norm_num_groups=4,
        latent_channels=C,
    )
    folder = tmp_path_factory.mktemp("vae") / "f16"
    model.save_pretrained(folder)
    return folder


def bring(source: Path, store: Path, *options: str) -> Path:
    argv = ["import", str(source), "--from", "lightningdit", "--store", str(store), "--name", "vavae"]
    assert storage([*argv, "--resolution", "64", "--shard-rows", "8", *options]) == 0
    return store


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported with its statistics."""
    return bring(source, tmp_path_factory.mktemp("with") / "store")


@pytest.fixture(scope="module")
def bare_store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported without."""
    return bring(source, tmp_path_factory.mktemp("without") / "store", "--latent-statistics", "none")


def train(store: Path, run: Path, *options: str, steps: int = 4) -> Path:
    argv = ["train", f"--preset={PRESET}", f"--store={store}", f"--run={run}", f"--steps={steps}", *MICRO, *options]
    assert trainer(argv) == 0
    return run


def saved(run: Path) -> dict[str, Any]:
    return parse_yaml((run / "config.yaml").read_bytes(), "x")["data"]


CHANNEL, SCALE = "--data.latent-normalisation=channel", "--data.latent-normalisation=scale"
ACCEPT = "--data.latent-deviation=accept"


@pytest.mark.parametrize("options", [(), (CHANNEL,)], ids=["by the identity", "measured"])
def test_a_run_stopped_and_gone_on_with_is_the_unbroken_one(
    store: Path, bare_store: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    of = bare_store if options else store
    whole = train(of, tmp_path / "whole", *options, steps=6)
    part = train(of, tmp_path / "part", *options, steps=3)
    train(of, part, *options, steps=6)
    assert_same_run(whole, part)
    if options:
        latents = open_store(of).group("latents/vavae").gather(np.arange(28).repeat(2), np.tile([0, 1], 28))["moments"]
        measured = latents[:, :C].astype(np.float64)
        np.testing.assert_allclose(saved(whole)["latent_mean"], measured.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(saved(whole)["latent_std"], measured.std((0, 2, 3)), rtol=1e-12)


def test_the_model_sees_deviations_of_one_and_another_map_trains_otherwise(
    store: Path, bare_store: Path, tmp_path: Path
) -> None:
    """Velocity ε − x of a model that begins at 0: the first loss is 1 + E[z²], 2 where latents are normalised."""
    by_identity = curve(train(store, tmp_path / "identity", steps=1))[0][1]
    by_measured = curve(train(bare_store, tmp_path / "measured", CHANNEL, steps=1))[0][1]
    by_factor = curve(train(store, tmp_path / "factor", SCALE, ACCEPT, steps=1))[0][1]
    assert by_identity == pytest.approx(2, abs=0.3)
    assert by_measured == pytest.approx(by_identity, rel=0.02)
    assert by_factor > 5


def test_a_run_keeps_the_statistics_it_was_trained_with(bare_store: Path, tmp_path: Path) -> None:
    """Receipts that say otherwise later on, as after mended images, change neither a resumed run nor its images."""
    copy = tmp_path / "copy"
    shutil.copytree(bare_store, copy)
    run = train(copy, tmp_path / "run", CHANNEL, steps=2)
    before = saved(run)
    root = open_store(copy).root
    group = open_store(copy).group("latents/vavae")
    with Staging(root) as staging:
        receipt, other = (read_receipt(root, group.layout, unit) for unit in (0, 1))
        assert receipt is not None
        assert other is not None
        write_receipt(root, group.layout, replace(receipt, statistics=other.statistics), staging.run_id)
    train(copy, run, CHANNEL, steps=3)
    train(copy, run, steps=4)  # not said again
    assert saved(run) == before
    fresh = train(copy, tmp_path / "fresh", CHANNEL, steps=1)
    assert saved(fresh)["latent_mean"] != before["latent_mean"]
    with pytest.raises(
        UserError, match=r"was made otherwise \(data.latent_mean: was .*; data.latent_normalisation: was c"
    ):
        train(copy, run, SCALE, ACCEPT, steps=5)


def test_a_run_of_before_the_settings_goes_on_as_it_was(bare_store: Path, tmp_path: Path) -> None:
    """Saved without them, it goes on on latents that a new run is refused, and is not said to be another run."""
    run = train(bare_store, tmp_path / "run", ACCEPT, steps=2)
    whole = train(bare_store, tmp_path / "whole", ACCEPT, steps=4)
    config, state = run / "config.yaml", next((run / "checkpoints").glob("*/state.json"))
    kept = [line for line in config.read_text().splitlines() if "latent_" not in line]
    config.write_text("\n".join(kept) + "\n")
    fields = json.loads(state.read_text())
    fields["config"] = {name: value for name, value in fields["config"].items() if "latent_" not in name}
    state.write_text(json.dumps(fields))
    train(bare_store, run, steps=4)
    assert_same_run(run, whole)
    assert "latent_" not in config.read_text()


def test_images_are_decoded_by_the_map_that_trained(store: Path, bare_store: Path, vae: Path, tmp_path: Path) -> None:
    for of, options in ((store, ()), (bare_store, (CHANNEL,))):
        run = train(of, tmp_path / of.parent.name, *options, steps=2)
        out = tmp_path / f"images-{of.parent.name}"
        settings = {"n": 4, "out": out, "vae": str(vae), "device": "cpu", "steps": 4, "batch": 4}
        assert trainer(["generate", str(run), *(f"--{name}={value}" for name, value in settings.items())]) == 0
        opened = open_run(run)
        opened.data.close()
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None
        recipe = override(opened.config, {"precision": "fp32", "sample.steps": 4})
        labels = torch.from_numpy(np.loadtxt(out / "labels.txt", dtype=np.int64))
        model = load_model(opened, checkpoint, "ema", CPU)
        with torch.inference_mode():
            z = draw_latents(model, torch.arange(4), labels, opened.geometry, recipe, 0)
        said = opened.data.latents.identity.latent_normalisation
        if options:
            said = {"mean": saved(run)["latent_mean"], "std": saved(run)["latent_std"]}
        assert said is not None
        mean, std = (torch.tensor(said[name], dtype=torch.float64).view(1, C, 1, 1) for name in ("mean", "std"))
        wanted = decode_latents(z * std + mean, load_decoder(str(vae), CPU))
        drawn = np.stack([read_image(image_path(out, i)) for i in range(4)])
        assert np.abs(drawn.astype(int) - wanted).max() <= 1
        assert np.abs(drawn.astype(int) - decode_latents(z, load_decoder(str(vae), CPU))).max() > 1


def test_an_export_carries_the_map(store: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(store, tmp_path / "run", steps=1)
    assert trainer(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "one")]) == 0
    opened = open_run(run)
    opened.data.close()
    with safe_open(tmp_path / "one" / "ema.safetensors", framework="pt") as file:
        scale, shift = (torch.tensor(json.loads(file.metadata()[f"latent_{of}"])) for of in ("scale", "shift"))
    torch.testing.assert_close(scale[None], opened.scale.scale, rtol=0, atol=0)
    torch.testing.assert_close(shift[None], opened.scale.shift, rtol=0, atol=0)
    assert trainer(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    decoder = AutoencoderKL.from_pretrained(vae)
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True, vae=decoder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, C, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"class_labels": [0, 1], "num_inference_steps": 3, "latents": noise}
    z = pipeline(**call, output_type="latent").images
    pictures = pipeline(**call, output_type="np").images
    wanted = decode_latents(opened.scale.stored(z), load_decoder(str(vae), CPU))
    assert np.abs(pictures - wanted / 255).max() < 1e-4 + 0.5 / 255


# Refusals -------------------------------------------------------------------------------------------------------------


def test_latents_that_nobody_normalised_are_refused_with_the_figures(bare_store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^latents/vavae is normalised by \(x − 0\) · 1, after which channel \d has mean \S+ and deviation \S+, "
        r"channel \d has .*; the deviation over all channels, [\d.]+, must be 0\.25 to 2: pass "
        r"--data\.latent-normalisation channel, or --data\.latent-deviation accept if it is meant$",
    ):
        train(bare_store, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(bare_store, tmp_path / "run", ACCEPT, steps=1)


def test_statistics_of_other_latents_are_refused_with_the_figures(source: Path, tmp_path: Path) -> None:
    torch.save({"mean": torch.zeros(1, C, 1, 1), "std": torch.full((1, C, 1, 1), 0.1)}, tmp_path / "other.pt")
    store = bring(source, tmp_path / "store", "--latent-statistics", str(tmp_path / "other.pt"))
    with pytest.raises(
        UserError,
        match=r"^latents/vavae is normalised by \(x − mean\) · \[10 … 10\] a channel, by mean and std of a file, after "
        r"which channel \d has mean \S+ and deviation \d\d\S*, .*; each channel must have a mean within ±1 and a "
        r"deviation of 0\.5 to 2: pass --data\.latent-normalisation channel, or --data\.latent-deviation accept",
    ):
        train(store, tmp_path / "run")
    train(store, tmp_path / "run", CHANNEL, steps=1)
    given = [CHANNEL, "--data.latent-mean=" + ",".join("0" * C), "--data.latent-std=" + ",".join("9" * C)]
    with pytest.raises(
        UserError, match=r"pass no --data\.latent-mean and --data\.latent-std, so that they are measured, or"
    ):
        train(store, tmp_path / "another", *given)


def test_channels_cannot_be_measured_by_receipts_without_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one factor the run begins, and says that nothing was checked."""
    make_store(tmp_path / "store")
    with pytest.raises(
        UserError, match=r"have no sums of their latents.*run `python -m storage statistics STORE latents/"
    ):
        train(tmp_path / "store", tmp_path / "run", CHANNEL, "--model.patch=2")
    assert not (tmp_path / "run").exists()
    train(tmp_path / "store", tmp_path / "auto", "--model.patch=2", steps=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("latents    ")]
    assert "· 0.5, whose deviation is not known and was not checked, as " in line
    assert line.endswith(
        "have no sums of their latents; run `python -m storage statistics STORE latents/tiny-vae` once"
    )
    assert storage(["statistics", str(tmp_path / "store"), "latents/tiny-vae"]) == 0
    train(tmp_path / "store", tmp_path / "run", CHANNEL, "--model.patch=2", steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.latent-mean=1,2",), r"^--data\.latent-mean has 2 numbers and --data\.latent-std 0; give both"),
        (
            ("--data.latent-mean=1,2", "--data.latent-std=1,2"),
            r"^--data\.latent-mean and --data\.latent-std go with --data\.latent-normalisation channel, not auto$",
        ),
        (
            (CHANNEL, "--data.latent-mean=1", "--data.latent-std=0"),
            r"^--data\.latent-std must be positive and finite, got",
        ),
        ((CHANNEL, "--data.latent-mean=nan", "--data.latent-std=1"), r"^--data\.latent-mean must be finite, got nan$"),
        (
            (CHANNEL, "--data.latent-mean=1,2", "--data.latent-std=1,2"),
            r"^--data\.latent-mean and --data\.latent-std have 2 numbers, and the latents 3 channels; give one",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    store: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(store, tmp_path / "run", *options)
