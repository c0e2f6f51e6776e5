"""The study of features as latents: its two models cost the same, and the trainer takes its options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import feature_latents
from benchmarks.effect.measure import ALIGNED_EYES, OTHER_EYES, Setting
from benchmarks.feature_latents import FEATURES_RUN, LATENTS_RUN, RUNS, SAMPLING, lines, read_results, train_command
from trainer.config.command_line import train_config
from trainer.models.flops import forward_flops_per_image
from trainer.models.transformer import Geometry


def setting(out: Path) -> Setting:
    return Setting(
        out=out,
        train_store=out / "train",
        heldout_store=out / "heldout",
        features="tiny-vit",
        encoder="tiny-vit",
        encoder_weights=None,
        second_weights=None,
        n_images=8,
        sampling={**SAMPLING, "precision": "bf16"},
        measures=out / "measures",
    )


def test_a_step_of_either_model_costs_the_same_within_three_per_cent(tmp_path: Path) -> None:
    cost = {}
    for name, (channels, side) in ((FEATURES_RUN, (384, 8)), (LATENTS_RUN, (4, 16))):
        options = train_command(name, setting(tmp_path), 10, tmp_path / "decoder")[2:]
        pairs = (option.removeprefix("--").split("=", 1) for option in options)
        config = train_config({key.replace("-", "_"): text for key, text in pairs})
        assert not config.aligns
        assert (config.batch, config.optim.clip, config.seed, config.steps) == (32, 1, 0, 10)
        assert config.precision == "bf16"
        model = config.model
        cost[name] = forward_flops_per_image(
            Geometry(
                kind=model.kind,
                input_size=side,
                channels=channels,
                patch=model.patch,
                width=model.width,
                depth=model.depth,
                heads=model.heads,
                n_classes=44,
                qk_norm=model.qk_norm,
                class_width=channels if model.class_token else 0,
                context=model.context,
                context_block=model.context_block,
            )
        )
    assert cost[FEATURES_RUN] == pytest.approx(cost[LATENTS_RUN], rel=0.03)


def test_the_table_has_what_is_measured(tmp_path: Path) -> None:
    for step, value in ((1000, 2.0), (2000, 1.5)):
        folder = tmp_path / LATENTS_RUN / f"{step:07d}"
        folder.mkdir(parents=True)
        (folder / f"{ALIGNED_EYES}.json").write_text(json.dumps({"metrics": {"fd": {"value": value}}}))
    (tmp_path / LATENTS_RUN / "decoded").mkdir()
    (tmp_path / LATENTS_RUN / "decoded" / f"{ALIGNED_EYES}.json").write_text('{"metrics": {"fd": {"value": 0.25}}}')
    text = lines(read_results(tmp_path), {"n": 3, "mean_db": 21.25}, ["", "2 GFLOP"])
    assert "| 1,000 steps | 2,000 steps | the latents, decoded |" in text
    assert f"| {LATENTS_RUN}, {ALIGNED_EYES} | 2.000 | 1.500 | 0.250 |" in text
    assert "\n\n2 GFLOP\n\n" in text
    assert OTHER_EYES not in text
    uneven = {FEATURES_RUN: {1000: {}, math.inf: {}}, LATENTS_RUN: {10_000: {}}}
    assert "| 1,000 steps | 10,000 steps | the latents, decoded |" in lines(uneven, {}, [])
    assert FEATURES_RUN not in text
    assert "3 held-out images: 21.25 dB" in text


@pytest.mark.slow
@pytest.mark.timeout(900)  # some thirty processes
def test_the_whole_study_on_built_in_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sources.photos import write_photos

    small = {"model.depth": "2", "model.width": "32", "model.heads": "2", "batch": "8"}
    monkeypatch.setattr(feature_latents, "RUNS", {name: of | small for name, of in RUNS.items()})
    for split, n in (("train", 4), ("heldout", 2)):
        write_photos(tmp_path / split, n_per_class=n, split=split)
        subprocess.run(
            [sys.executable, "-m", "pipeline", "precompute", f"--data={tmp_path}/{split}",
             f"--store={tmp_path}/{split}-store", "--latents=tiny-vae", "--features=tiny-vit", "--resolution=128",
             "--flip"], check=True,
        )  # fmt: skip
    options = [
        f"--data={tmp_path}/train", f"--heldout={tmp_path}/heldout", f"--train-store={tmp_path}/train-store",
        f"--heldout-store={tmp_path}/heldout-store", "--features=tiny-vit", f"--out={tmp_path}/out", "--images=8",
        f"--results={tmp_path}/results.md", "--decoder-steps=2", "--steps", "2",
    ]  # fmt: skip
    assert feature_latents.main(options) == 0
    first = sorted((tmp_path / "out" / "measures-fp32").rglob("*.json"))
    assert len(first) == 4, "each model's, drawn and decoded"
    times = [path.stat().st_mtime_ns for path in first]
    assert feature_latents.main([*options, "4"]) == 0
    assert [path.stat().st_mtime_ns for path in first] == times
    results = (tmp_path / "results.md").read_text()
    assert "4 steps" in results
    assert results.count(" GFLOP an image") == 2
    assert (tmp_path / "out" / "measures-fp32" / FEATURES_RUN / "0000004" / "samples.jpg").is_file()
