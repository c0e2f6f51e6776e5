"""A store without labels: training, sampling and what follows do without, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.encoders.tiny import TINY_VAE
from storage import StoreError, UserError
from storage import index as store_index
from tests.stores import make_store
from tests.trainer.runs import curve, micro, weights
from trainer.__main__ import main
from trainer.config.saved import read_config
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.evaluation.report.page import write_report
from trainer.loop.train import train
from trainer.run.opened import open_run

SAMPLES = {"log.samples_every": 3, "log.samples": 2, "sample.steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a store without labels, aligned, with samples drawn while it trains."""
    folder = tmp_path_factory.mktemp("unlabelled")
    make_store(folder / "store", label=-1)
    train(micro(folder / "store", folder / "run", **SAMPLES, **{"checkpoint.every": 3, "steps": 3}))
    train(micro(folder / "store", folder / "run", **SAMPLES, **{"checkpoint.every": 3}))
    return folder / "run"


def test_it_trains_unconditionally_and_says_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(micro(run.parent / "store", tmp_path / "run", **SAMPLES))
    assert "\nlabels     none: trains unconditionally, without label dropout or guidance\n" in capsys.readouterr().out
    assert open_run(run).geometry.n_classes == 0
    assert weights(run)["y_embedder.embedding_table.weight"].shape == (1, 32)
    assert read_config(run / "config.yaml").config.sample.guidance == 1, "the preset's is 2.5"
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert curve(run) == curve(tmp_path / "run"), "resumed, and unbroken"


def test_label_dropout_does_not_matter(run: Path, tmp_path: Path) -> None:
    train(micro(run.parent / "store", tmp_path / "run", **{"loss.label_dropout": 0.0}))
    assert curve(tmp_path / "run") == curve(run)


def test_images_are_drawn_without_labels(run: Path) -> None:
    config = {"run": run, "n": 3, "batch": 3, "vae": str(TINY_VAE), "device": "cpu", "steps": 2}
    folder, _, packed = generate(GenerateConfig(**config, format="npz"))
    assert len(list(folder.glob("0*.png"))) == 3
    assert not (folder / "labels.txt").exists()
    with pytest.raises(
        UserError, match="trained without labels, so there is no class to guide towards; leave --guidance"
    ):
        generate(GenerateConfig(**config, guidance=1.5))
    assert packed.is_file()


def test_what_follows_does_without_or_says_why(run: Path, tmp_path: Path) -> None:
    assert sweep(run, SweepConfig(n=20, k=3, device="cpu"), ["cknna"])["points"]
    for command in ("probe", "analyse"):
        words = [command, str(run), "--out", str(tmp_path / "out"), "--times", "0.5", "--device", "cpu", "--k", "3"]
        with pytest.raises(UserError, match="a probe needs one for each, `cknna` none"):
            main(words)
    (page,) = write_report([run], tmp_path / "report.html", "")
    assert "run" in page.read_text()
    (card,) = (export(run, "diffusers", tmp_path / "exported", "latest")[0] / "README.md",)
    assert "An unconditional SiT" in card.read_text()


def test_the_exported_pipeline_draws(run: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    (folder,) = export(run, "diffusers", tmp_path / "exported", "latest")
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    drawn = pipeline(class_labels=[0, 0], num_inference_steps=2, output_type="latent").images
    assert torch.isfinite(drawn).all()
    with pytest.raises(ValueError, match="no class to guide towards"):
        pipeline(class_labels=[0], num_inference_steps=2, guidance_scale=2.0, output_type="latent")


def test_some_rows_without_a_label_are_refused_or_all_labels_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = store_index.make_index
    monkeypatch.setattr(
        "tests.stores.make_index", lambda keys, labels, *rest: make(keys, [-1, 0, -1, *labels[3:]], *rest)
    )
    make_store(tmp_path / "store")
    with pytest.raises(
        (UserError, StoreError), match=r"2 of the 40 samples .* have no label \(first row 0\); .*--loss.label-dropout 1"
    ):
        train(micro(tmp_path / "store", tmp_path / "run"))
    train(micro(tmp_path / "store", tmp_path / "run", **{"loss.label_dropout": 1.0}))
    assert open_run(tmp_path / "run").geometry.n_classes == 0
