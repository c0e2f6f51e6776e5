"""Runs on one encoder's tokens as latents, aligned with another's features: training, and all that follows, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.__main__ import main as pipeline_main
from pipeline.config import PrecomputeConfig
from pipeline.encoders.glyph import GLYPH_DECODER
from pipeline.encoders.glyph.train import digits
from pipeline.encoders.tiny.train import psnr_db
from pipeline.plan import plan_groups
from pipeline.sources.glyphs import DEMO, RESOLUTION
from storage import StoreLayout, open_store, places
from storage.__main__ import main as storage_main
from storage.base.errors import UserError
from storage.derive import derive_group
from tests.pipeline.encoding import encode_store
from tests.trainer.runs import assert_same_run, curve, micro
from trainer.config.tree import override
from trainer.data.feature_latents import read_latents, without_affine
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.decode import decode_latents, decoder_sha256
from trainer.evaluation.generate.feature_decoder import load_feature_decoder
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.generate.image_files import image_path, read_image
from trainer.evaluation.generate.outcome import evaluation_of
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.report.page import write_report
from trainer.loop.train import train
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_metrics
from trainer.run.opened import open_run

CPU = torch.device("cpu")
A, B = "features/glyph-vit", "glyph-namer"
RIT: dict[str, Any] = {
    "data.latents": A, "data.features": (B,), "model.kind": "rit", "model.patch": 1, "model.class_token": True,
    "model.context": 3, "model.context_block": 2, "loss.projection_weight": (0.5,), "loss.time_shift": 0.0,
    "sample.shift": 0.0, "sample.sampler": "ode", "sample.steps": 2,
}  # fmt: skip
DITDH: dict[str, Any] = {
    "data.latents": A, "data.features": (B,), "model.kind": "ditdh", "model.patch": 1, "model.head_width": 96,
    "model.head_depth": 1, "model.head_heads": 2, "loss.projection_weight": (0.5,), "sample.sampler": "ode",
    "sample.steps": 2,
}  # fmt: skip
MODELS: Mapping[str, dict[str, Any]] = {"rit": RIT, "ditdh": DITDH}


@pytest.fixture(scope="module")
def originals() -> tuple[np.ndarray, np.ndarray]:
    """Images of the demo's style over parts of photographs, and of draws, that no built-in encoder ever saw."""
    images, labels, _ = digits("heldout", 4, 0, DEMO)
    return images, labels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, originals: tuple[np.ndarray, np.ndarray]) -> Path:
    """Two groups of the same images, as stage one writes them; no latents of an autoencoder."""
    root = tmp_path_factory.mktemp("two") / "store"
    images, labels = originals
    config = PrecomputeConfig(
        data="-", store=str(root), latents="none", features=f"glyph-vit,{B}", resolution=RESOLUTION
    )
    layout = StoreLayout(n_rows=len(images), views=("original",), resolution=RESOLUTION, shard_rows=len(images))
    encode_store(root, plan_groups(config, layout, "0" * 64), images, labels.tolist())
    assert storage_main(["statistics", str(root), A, "--places"]) == 0
    return root


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps at once, with previews of which nobody said what makes them."""
    root = tmp_path_factory.mktemp("runs")
    for name, changes in MODELS.items():
        train(micro(store, root / name, **changes, **{"log.samples": 2, "log.samples_every": 6}))
    return {name: root / name for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_from_both_and_resumes_bit_for_bit(name: str, store: Path, runs: dict[str, Path]) -> None:
    resumed = runs[name].with_name(f"{name}-resumed")
    config = micro(store, resumed, **MODELS[name], **{"log.samples": 2, "log.samples_every": 6})
    train(override(config, {"steps": 3}))
    train(config)
    assert_same_run(runs[name], resumed)
    assert len(curve(resumed)) == 6
    assert all(-1 <= line["alignment_cosine"] <= 1 for line in read_metrics(resumed))
    with_cosine = [line["alignment_loss"] for line in read_metrics(runs[name])]
    assert with_cosine[-1] < with_cosine[0] < 0.2  # −cos, and it falls
    assert open_run(resumed).data.identities.keys() == {A, f"features/{B}"}


@pytest.mark.parametrize("name", MODELS)
def test_all_that_follows_knows_such_runs(name: str, runs: dict[str, Path], tmp_path: Path, store: Path) -> None:
    run = runs[name]
    assert RunFolder(run).preview(6).is_file()
    folder, _ = generate(GenerateConfig(run=run, n=20, batch=10, device="cpu", out=tmp_path / "images"))
    assert read_image(image_path(folder, 0)).shape == (RESOLUTION, RESOLUTION, 3)
    noted = json.loads((folder / "settings.json").read_text())
    assert noted["decoder"] == "glyph-decoder"
    files = [tmp_path / "generated.npz", tmp_path / "originals.npz"]
    said = ["features", str(folder), str(store.parent / "originals"), "--encoder", B, "--token", "mean", "--device"]
    write_originals(store.parent / "originals")
    assert pipeline_main([*said, "cpu", "--out", *map(str, files)]) == 0
    generated, heldout = files
    result = evaluate(generated, heldout, Description(encoder=B), out=tmp_path / "out", run=run, resamples=0)
    assert result["metrics"]["fd"]["value"] > 0
    assert result["metrics"]["fd"]["n_generated"] == 20
    for features, path in (("", f"features/{B}"), ("glyph-vit", A)):  # of both groups
        found = sweep(run, SweepConfig(n=40, k=3, device="cpu", batch=8, features=features), ["cknna", "probe"])
        assert found["features"]["path"] == path
        assert found["aligned_blocks"] == [1]
        assert all(0 <= point["probe"] <= 1 for point in found["points"])
    with pytest.raises(UserError, match=r"is a run, and images of one setting are measured; name a folder samples-"):
        evaluate(run, heldout, Description(encoder=B))
    (exported,) = export(run, "safetensors", tmp_path / "safetensors", "latest")
    assert (exported / "latent-statistics.safetensors").is_file()
    (page,) = write_report(list(runs.values()), tmp_path / "report.html", "")
    assert name in page.read_text()


def write_originals(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i, image in enumerate(digits("heldout", 2, 1, DEMO)[0]):
        Image.fromarray(image).save(folder / f"{i}.png")


def test_the_built_in_decoder_makes_digits_of_tokens_it_never_saw(
    store: Path, originals: tuple[np.ndarray, np.ndarray]
) -> None:
    """From what is stored, float16 and with the final norm's affine part, back to held-out originals."""
    group = open_store(store).group(A)
    decoder = load_feature_decoder("glyph-decoder", group, CPU)
    tokens = without_affine(read_latents(group, np.arange(len(originals[0]))).float(), group)
    assert psnr_db(originals[0], decode_latents(tokens, decoder)).mean() >= 20
    group.close()
    assert sum(file.stat().st_size for file in GLYPH_DECODER.iterdir()) <= 4_000_000
    assert decoder_sha256("glyph-decoder") == decoder_sha256(str(GLYPH_DECODER)) is not None


def test_it_decodes_its_own_encoder_s_last_tokens_only(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    with pytest.raises(
        UserError, match=r"glyph-decoder decodes timm.VisionTransformer of width 96 on 4×4 tokens, and "
    ):
        load_feature_decoder("glyph-decoder", opened.group(f"features/{B}"), CPU)
    layer = tmp_path / "layer"
    config = PrecomputeConfig(
        data="-", store=str(layer), latents="none", features="glyph-vit:layer=3", resolution=RESOLUTION
    )
    layout = StoreLayout(n_rows=4, views=("original",), resolution=RESOLUTION, shard_rows=4)
    encode_store(layer, plan_groups(config, layout, "0" * 64), digits("train", 1, 0, DEMO)[0][:4])
    with pytest.raises(
        UserError, match=r"glyph-decoder decodes tokens after the final norm, and features/\S+ is of bl"
    ):
        load_feature_decoder("glyph-decoder", open_store(layer).group("features/glyph-vit-layer3"), CPU)
    config_of_another = tmp_path / "other"
    config_of_another.mkdir()
    for file in GLYPH_DECODER.iterdir():
        (config_of_another / file.name).write_bytes(file.read_bytes().replace(b'sha256": "', b'sha256": "0'))
    with pytest.raises(UserError, match=r"decodes tokens of weights 0\w{11}, and features/glyph-vit is of weights"):
        load_feature_decoder(str(config_of_another), opened.group(A), CPU)


def test_a_decoder_of_something_else_is_refused_before_training(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would make no picture, and previews, which end no run, would not say so."""
    config = micro(store, tmp_path / "run", **{**RIT, "steps": 1})
    other = shutil.copytree(GLYPH_DECODER, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    for changes, says in (
        ({"_class_name": "AutoencoderKL"}, "holds AutoencoderKL, and features are decoded by AutoencoderRAE"),
        ({"encoder_hidden_size": 64}, "decodes timm.VisionTransformer of width 64 on 4×4 tokens, and"),
        ({"encoder_patch_size": 0}, "cannot be loaded .ZeroDivisionError"),
    ):
        (other / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(UserError, match=says):
            train(override(config, {"data.decoder": str(other)}))
        assert not RunFolder(tmp_path / "run").is_run
    (tmp_path / "file").touch()
    for nothing in (str(tmp_path / "nowhere"), str(tmp_path / "file"), "typo", "a//b", "./a"):
        with pytest.raises(UserError, match="is no folder on this machine, and no hub id ORG/NAME"):
            train(override(config, {"data.decoder": nothing}))
        assert not RunFolder(tmp_path / "run").is_run
    for decoder in ("", "glyph-decoder", "hub/id"):
        train(override(config, {"run": tmp_path / f"of-{decoder[:3]}", "data.decoder": decoder}))
        said = capsys.readouterr().out
        assert f"pictures   by {decoder or 'glyph-decoder'}\n" in said
        assert ", 17 to 20 tokens\n" in said  # 4×4 patches, the class token, the label's from the second block on


def test_a_group_s_name_may_end_as_a_shell_completes_it(store: Path, tmp_path: Path) -> None:
    """And a resume may spell it otherwise."""
    names = {"data.latents": f"{A}/", "data.features": (f"{B}/",)}
    root = Path(shutil.copytree(store, tmp_path / "store"))
    config = micro(root, tmp_path / "run", **{**RIT, **names, "steps": 1})
    train(config)
    kept = RunFolder(tmp_path / "run").read_config().config
    assert (kept.data.latents, kept.data.features) == (A, (B,))
    train(override(config, {"data.latents": A, "data.features": (B,), "steps": 2}))
    (root / places.key_of(A)).unlink()  # a run keeps its own, however its group is spelled
    train(override(config, {"steps": 3}))


def test_a_derived_group_is_described_by_its_encoder(store: Path, tmp_path: Path) -> None:
    """A group's name need not be an encoder's."""
    root = Path(shutil.copytree(store, tmp_path / "store"))
    derive_group(root, A, "rotated4", n_workers=1)
    run = tmp_path / "derived"
    train(micro(root, run, **{**RIT, "data.features": ("glyph-vit-rotated4",), "steps": 1}))
    assert evaluation_of(run, tmp_path / "images").endswith(f"--encoder glyph-vit --run {run}")


def test_the_page_names_the_encoder_of_latents_that_is_here(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "alone"
    train(micro(store, run, **{**RIT, "data.features": (), "loss.projection_weight": (0.0,), "steps": 1}))
    (page,) = write_report([run], tmp_path / "report.html", "")
    assert f"score {run} --n 512 --reference {store} --encoder glyph-vit" in page.read_text()
