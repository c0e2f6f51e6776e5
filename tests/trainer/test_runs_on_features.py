"""Runs whose latents are an encoder's features: what a step reads, what a run keeps, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from storage import Staging, open_store, places
from storage.__main__ import main as storage_main
from storage.base.errors import StoreError, UserError
from storage.final_norm import AFFINE
from storage.final_norm import PLAIN as PLAIN_NORM
from storage.roots import open_root
from tests.stores import FEATURES, make_store
from tests.trainer.feature_stores import DITDH, NORM, RIT, plain_tokens, write, write_affine
from tests.trainer.runs import assert_same_run, micro
from trainer.data.feature_latents import (
    on_grid,
    read_latents,
    statistics_of,
)
from trainer.data.groups import geometry_of, open_data
from trainer.data.loader import Loader
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.loop.train import train
from trainer.run.folder import RunFolder
from trainer.run.latent_map import map_of
from trainer.run.opened import open_run
from trainer.run.settings import remember

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features") / "store"
    write_affine(root)
    return root


def test_a_step_reads_one_group_and_no_vae_latents(store: Path, tmp_path: Path) -> None:
    """There are none in this store."""
    config = micro(store, tmp_path / "run", **RIT)
    data = open_data(config)
    assert sorted(data.readers(with_targets=True)) == [f"{FEATURES}/cls", f"{FEATURES}/patches"]
    with Loader(data, seed=0, batch=8, start=0, stop=2, rank=0, world_size=1, device=CPU, prefetch=1) as loader:
        for batch in loader:
            rows = batch.rows.numpy()
            assert torch.equal(batch.moments, read_latents(data.latents, rows).half())
            assert batch.class_tokens is not None
            assert np.array_equal(batch.class_tokens, data.latents.gather(rows, 0, ["cls"])["cls"])
            assert batch.targets == ()
    geometry = geometry_of(config, data)
    assert (geometry.channels, geometry.input_size, geometry.class_width) == (24, 8, 24)
    data.close()


def test_either_view_of_an_image_is_learned(tmp_path: Path) -> None:
    """Where the store has its mirror image too; its class token goes with it, and both are in the statistics."""
    views = np.concatenate([plain_tokens(), 3 + plain_tokens()[:, :, ::-1]], axis=1)
    write(tmp_path / "store", views, layer=PLAIN_NORM)
    data = open_data(micro(tmp_path / "store", tmp_path / "run", **RIT))
    statistics, _ = statistics_of(data.store, data.latents, Path(), class_token=True)
    mean = views.astype(np.float16).astype(np.float64).mean((0, 1)).T.reshape(24, 8, 8)
    np.testing.assert_allclose(statistics.mean, mean, atol=1e-4)
    seen = set()
    with Loader(data, seed=0, batch=8, start=0, stop=6, rank=0, world_size=1, device=CPU, prefetch=1) as loader:
        for batch in loader:
            assert batch.class_tokens is not None
            for row, latents, class_token in zip(batch.rows, batch.moments, batch.class_tokens, strict=True):
                of_views = on_grid(torch.from_numpy(views[int(row)]), (8, 8)).half()
                (view,) = [view for view in (0, 1) if torch.equal(latents, of_views[view])]
                assert np.array_equal(class_token, views[int(row), view, 0].astype(np.float16))
                seen.add(view)
    assert seen == {0, 1}
    data.close()


def test_aligned_with_another_encoder(tmp_path: Path) -> None:
    """Each group is read once, also where latents and target are the same; class tokens are not aligned."""
    make_store(tmp_path / "store")
    storage_main(["statistics", str(tmp_path / "store"), FEATURES, "--places"])
    config = micro(tmp_path / "store", tmp_path / "run", **{**RIT, "loss.projection_weight": (0.5,)}, steps=2)
    data = open_data(config)
    assert sorted(data.readers(with_targets=True)) == [f"{FEATURES}/cls", f"{FEATURES}/patches"]
    data.close()
    last = train(config)["last"]
    parts = last["denoising_loss"] + 0.03 * last["class_denoising_loss"] + 0.5 * last["alignment_loss"]
    assert last["loss"] == pytest.approx(parts)


def test_a_norm_that_became_known_makes_no_other_map(tmp_path: Path) -> None:
    """The same numbers, counted before the group said what its norm was: of f, and then taken for those of n."""
    root, run = tmp_path / "store", tmp_path / "run"
    tokens = plain_tokens() * NORM.weight + NORM.bias
    write(root, tokens, layer=AFFINE)
    train(micro(root, run, steps=1, **RIT))
    shutil.rmtree(root)
    write(root, tokens, layer=AFFINE, norm=NORM)
    says = r"said that the affine part of its final norm is none, and it says [0-9a-f]{12} now, .*; pass --store with"
    with pytest.raises(UserError, match=says):
        generate(GenerateConfig(run=run, n=1, device="cpu"))
    with pytest.raises(UserError, match=says):
        train(micro(root, run, steps=2, **RIT))
    copy = RunFolder(run).latent_statistics
    saved = load_file(copy)
    save_file(saved, copy)  # a run of before copies said it goes on
    open_run(run).data.close()


def test_a_run_in_memory_is_the_same(store: Path, tmp_path: Path) -> None:
    for resident in ("stream", "ram"):
        train(micro(store, tmp_path / resident, steps=3, **RIT, **{"data.resident": resident}))
    assert_same_run(tmp_path / "stream", tmp_path / "ram")


def test_a_run_keeps_its_statistics(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the store has lost them; with neither it says so. The shift is that of the latents' dimension."""
    root, whole, parts = tmp_path / "store", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(store, root)
    train(micro(root, whole, steps=4, **RIT))
    assert "a channel and place of 8², by statistics " in capsys.readouterr().out
    train(micro(root, parts, steps=2, **RIT))
    (root / places.key_of(FEATURES)).unlink()
    train(micro(root, parts, steps=4, **RIT))
    assert_same_run(whole, parts)
    run = open_run(whole)
    run.data.close()
    assert run.config.loss.time_shift == run.config.sample.shift == pytest.approx((24 * 64 / 4096) ** 0.5)
    assert str(run.scale) == str(map_of(run.config, run.data, parts))
    kept = RunFolder(parts).latent_statistics
    copy = kept.read_bytes()
    kept.unlink()
    with pytest.raises(UserError, match=r"has no statistics of its places, by which latents are normalised; run `pyt"):
        train(micro(root, parts, steps=5, **RIT))
    group = open_store(root).group(FEATURES)
    counted = places.count(group, 1)
    with Staging(root) as staging:
        others = dataclasses.replace(counted, var=1.01 * counted.var)
        places.publish(open_root(root), group, others, staging.run_id)
    group.close()
    with pytest.raises(
        UserError, match=r"was trained with other statistics of \S+ than all tokens of the group .*; res"
    ):
        train(micro(root, parts, steps=5, **RIT))
    with pytest.raises(UserError, match=r"was trained with other statistics of"):
        generate(GenerateConfig(run=parts, n=1, device="cpu"))
    kept.write_bytes(copy)
    train(micro(root, parts, steps=5, **RIT))
    train(micro(root, whole, steps=5, **RIT))  # by its own copy
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {**DITDH, "model.head_width": 16},
            "--model.head-width 16 is below the 24 numbers of a token of features/tin",
        ),
        (
            {"data.latents": FEATURES, "model.patch": 2, "loss.projection_weight": (0.0,)},
            "--model.width 32 is below the 96 numbers .* give at least 96, or --model.kind rit, which predicts",
        ),
        ({**RIT, "data.latent_normalisation": "scale"}, "is normalised by channel and place; leave"),
        ({**RIT, "data.latents": "features/none"}, "has no features/none"),
        ({**RIT, "model.heads": 16}, r"--model.width over its heads must be a multiple of 4 .* got 32 over 16 = 2;"),
        (
            {**DITDH, "model.head_heads": 16},
            r"--model.head-width over its heads must be a multiple of 4 .* --model.kind ditdh, got 32 over 16 = 2;",
        ),
        (
            {"data.latents": FEATURES, "model.patch": 1, "model.class_token": True},
            f"of --model.kind sit joins an autoencoder's latents, and {FEATURES} is of an encoder, whose own class",
        ),
        (
            {"data.latent_statistics": Path("x.pt")},
            "--data.latent-statistics is of features as latents; pass --data",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(store: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        train(micro(store, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_what_a_store_lacks_is_one_line(shared_tiny_store: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "bare")
    with pytest.raises(UserError, match=r"run `python -m storage statistics \S+ features/tiny-vit --places` once, or"):
        train(micro(tmp_path / "bare", tmp_path / "run", **RIT))
    with pytest.raises(UserError, match=r"and latents/tiny-vae is of an autoencoder; pass --data.latents feat"):
        train(micro(shared_tiny_store, tmp_path / "run", **{**RIT, "data.latents": ""}))
    write(tmp_path / "features", np.random.default_rng(0).normal(size=(16, 1, 64, 24)), layer=PLAIN_NORM)
    for changes in (RIT, {}):
        with pytest.raises(UserError, match=f"has no latents; pass --data.latents {FEATURES} to learn features as la"):
            train(micro(tmp_path / "features", tmp_path / "run", **{**changes, "data.latents": ""}))


def test_statistics_that_are_gone_or_damaged_are_named_before_anything_is_drawn(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(micro(store, tmp_path / "run", **{**RIT, "steps": 1, "sample.sampler": "ode"}))
    copy = RunFolder(tmp_path / "run").latent_statistics
    copy.write_bytes(copy.read_bytes()[:1000])
    loaded: list[object] = []
    monkeypatch.setattr("trainer.evaluation.generate.generate.load_model", lambda *given: loaded.append(given))
    monkeypatch.setattr("trainer.evaluation.probing.sweep.pooled_features", lambda *given: loaded.append(given))
    drawn = GenerateConfig(run=tmp_path / "run", n=1, device="cpu", vae=str(tmp_path))
    measured = SweepConfig(n=16, device="cpu", features=FEATURES.partition("/")[2])
    for measure in (lambda: generate(drawn), lambda: sweep(tmp_path / "run", measured, ["probe"])):
        with pytest.raises(StoreError, match=r"latent-statistics.safetensors is damaged .*; restore it, or remove it"):
            measure()
    assert not loaded


def test_a_run_that_goes_on_otherwise_is_told_what_is_other(store: Path, tmp_path: Path) -> None:
    """Not that statistics, or features that nobody named, do not fit what is asked for now."""
    run = tmp_path / "run"
    aligned = {**RIT, "data.features": (FEATURES.partition("/")[2],), "loss.projection_weight": (0.5,)}
    train(micro(store, run, **{**aligned, "steps": 1}))
    vanilla = micro(store, run, **{**RIT, "steps": 2})
    with pytest.raises(
        UserError, match=r"was made otherwise \(data.features: was .*loss.projection_weight: was 0.5, is"
    ):
        train(vanilla)
    other = f"{FEATURES}-again"
    remembered = remember(micro(store, run, **{**aligned, "data.latents": other}))
    assert not remembered.data.latent_statistics_sha256
    assert remember(micro(store, run, **aligned)).data.latent_statistics_sha256
