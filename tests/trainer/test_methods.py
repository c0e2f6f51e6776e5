"""Every method that trains from a store: exact resume, also across the end of an alignment, and ranks against one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.encoders.tiny import TINY_VAE
from storage import StoreLayout
from storage.base.errors import UserError
from tests.slow import slow_but
from tests.stores import FEATURES, make_layouts, make_store, random_arrays
from tests.trainer.feature_stores import DITDH, RIT
from tests.trainer.runs import assert_same_run, curve, micro, train_on_ranks, weights
from trainer.evaluation.export.export import export
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.probing.hidden_states import noisy_latents, pooled_hidden_states, read_rows
from trainer.evaluation.probing.sweep import SweepConfig, open_samples, sweep
from trainer.evaluation.report.page import write_report
from trainer.loop import log_window
from trainer.loop import train as loop
from trainer.loop.train import train
from trainer.models.flops import forward_flops_per_image
from trainer.models.reg import split
from trainer.run.checkpoint import OPTIMIZER, latest_checkpoint, read_state
from trainer.run.metrics import read_metrics
from trainer.run.opened import load_model, open_run

STEPS, STOP = 8, 4
STOPPED = {"loss.stop_alignment_at": STOP}
REG = {"model.class_token": True}
METHODS: dict[str, dict[str, Any]] = {
    "repa-stopped": STOPPED,
    "irepa": {"loss.alignment": ("irepa",)},
    "irepa-stopped": {"loss.alignment": ("irepa:gamma=0.8",), **STOPPED},
    "reg": REG,
    "reg-stopped": {**REG, **STOPPED},
    "two-kinds-stopped": {"model.align_block": (1, 2), "loss.alignment": ("cosine", "irepa"), **STOPPED},
    "lightningdit": {"model.kind": "lightningdit", "loss.time_sampling": "logit-normal", "loss.direction_weight": 1.0},
    "rit": {**RIT, "loss.projection_weight": (0.5,), "loss.class_noise": "mean"},
    "rit-stopped": {**RIT, "loss.projection_weight": (0.5,), **STOPPED},
    "ditdh": {**DITDH, "loss.projection_weight": (0.5,)},
    "features-as-sit": {"data.latents": FEATURES, "model.patch": 1},
}
KEPT = ("irepa", "reg-stopped", "lightningdit", "rit", "ditdh")  # in the default run
SAMPLED = {"log.samples_every": 5, "log.samples": 2, "sample.steps": 2}


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("method", slow_but(METHODS, KEPT))
def test_a_run_in_parts_is_the_unbroken_one(method: str, shared_tiny_store: Path, tmp_path: Path) -> None:
    changes = {**METHODS[method], **SAMPLED, "log.every": 3}
    train(micro(shared_tiny_store, tmp_path / "whole", steps=STEPS, **changes))
    for steps in (2, STOP, STOP + 1, STEPS):
        train(micro(shared_tiny_store, tmp_path / "parts", steps=steps, **changes))
    assert curve(tmp_path / "parts")[-1] == curve(tmp_path / "whole")[-1]
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    of_parts, of_whole = (load_file(newest(tmp_path / name) / OPTIMIZER) for name in ("parts", "whole"))
    assert of_parts.keys() == of_whole.keys()
    assert all(torch.equal(of_parts[name], of_whole[name]) for name in of_whole)


def test_a_run_saved_with_the_older_name_of_its_times_goes_on(shared_tiny_store: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(micro(shared_tiny_store, whole, steps=2, **METHODS["lightningdit"]))
    train(micro(shared_tiny_store, run, steps=1, **METHODS["lightningdit"]))
    for file in (run / "config.yaml", newest(run) / "state.json"):
        assert "logit-normal" in file.read_text()
        file.write_text(file.read_text().replace("logit-normal", "lognormal"))
    train(micro(shared_tiny_store, run, steps=2, **METHODS["lightningdit"]))
    assert_same_run(whole, run)


@pytest.fixture(scope="module")
def on_ranks(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every method that is selected on two ranks, as replicas and as shards, and on one."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ranks")
    cases = [item.callspec.params for item in request.session.items if "on_ranks" in _fixtures(item)]
    plans = [
        {
            **{"store": shared_tiny_store, "run": root / f"{case['method']}-{case['parallel']}", "steps": 6},
            **{"parallel": case["parallel"], **METHODS[case["method"]]},
        }
        for case in cases
    ]
    assert train_on_ranks(2, plans) == [[""] * len(plans)] * 2
    for method in dict.fromkeys(case["method"] for case in cases):
        train(micro(shared_tiny_store, root / method, steps=6, **METHODS[method]))
    return root


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", slow_but(METHODS, KEPT))
def test_two_ranks_are_one(method: str, parallel: str, on_ranks: Path) -> None:
    ours, theirs = (read_metrics(on_ranks / name) for name in (f"{method}-{parallel}", method))
    assert len(ours) == len(theirs) == 6
    for line, same in zip(ours, theirs, strict=True):
        for name in ("loss", "denoising_loss", "alignment_loss", "class_denoising_loss", "gradient_norm"):
            value = same.get(name)
            assert line.get(name) == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    for kind in ("model", "ema"):
        mine, one = weights(on_ranks / f"{method}-{parallel}", kind), weights(on_ranks / method, kind)
        assert list(mine) == list(one)
        assert all(torch.allclose(mine[name], one[name], atol=2e-4) for name in one)


def test_what_a_stop_leaves(shared_tiny_store: Path, tmp_path: Path) -> None:
    """Features are not read, projectors rest, the log has no alignment; until then it is the run without a stop."""
    train(micro(shared_tiny_store, tmp_path / "never", steps=6))
    train(micro(shared_tiny_store, tmp_path / "stopped", steps=6, **STOPPED))
    never, stopped = read_metrics(tmp_path / "never"), read_metrics(tmp_path / "stopped")
    same = ("denoising_loss", "alignment_loss", "alignment_cosine", "gradient_norm")
    assert [[line[name] for name in same] for line in stopped[:STOP]] == [
        [line[name] for name in same] for line in never[:STOP]
    ]
    assert stopped[STOP]["denoising_loss"] == never[STOP]["denoising_loss"]  # of the weights that STOP steps have made
    for line in stopped[STOP:]:
        assert line["alignment_loss"] is None
        assert "alignment_cosine" not in line
        assert line["loss"] == line["denoising_loss"]
    assert stopped[-1]["denoising_loss"] != never[-1]["denoising_loss"]
    train(micro(shared_tiny_store, tmp_path / "at", steps=STOP, **STOPPED))
    assert not read_state(newest(tmp_path / "at")).alignment_stopped
    assert read_state(newest(tmp_path / "stopped")).alignment_stopped
    before, after = weights(tmp_path / "at"), weights(tmp_path / "stopped")
    projectors = [name for name in before if name.startswith("projectors.")]
    assert projectors
    assert all(torch.equal(before[name], after[name]) for name in projectors)
    assert not any(name.startswith("projectors.") for name in load_file(newest(tmp_path / "stopped") / OPTIMIZER))


def test_the_stop_is_said_as_it_comes_and_where_it_never_does(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(steps: int, **changes: Any) -> list[str]:
        train(micro(shared_tiny_store, tmp_path, steps=steps, **changes))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("alignment ")]

    never = "alignment  never stops in this run of {} steps (--loss.stop-alignment-at 4)"
    rests = "no features are read for it, projectors rest"
    assert said(2, **STOPPED) == [never.format(2)]
    assert said(STOP, **STOPPED) == [never.format(STOP)]
    assert said(5, **STOPPED) == [f"alignment  has stopped, by --loss.stop-alignment-at 4: {rests}"]
    assert said(6, **STOPPED) == [f"alignment  has stopped, by --loss.stop-alignment-at 4: {rests}"]
    shutil.rmtree(tmp_path)
    assert said(6, **STOPPED) == ["alignment  stops after step 4 of 6", f"alignment stops after step 4: {rests}"]
    shutil.rmtree(tmp_path)
    assert said(1) == []


def test_a_log_line_across_the_stop_is_of_the_steps_that_had_an_alignment(
    shared_tiny_store: Path, tmp_path: Path
) -> None:
    for every in (1, 3):
        changes = {**STOPPED, "log.every": every}
        train(micro(shared_tiny_store, tmp_path / f"every-{every}", steps=6, **changes))
    single, triple = (read_metrics(tmp_path / f"every-{every}") for every in (1, 3))
    assert triple[1]["alignment_loss"] == pytest.approx(single[3]["alignment_loss"])
    assert triple[1]["denoising_loss"] == pytest.approx(sum(line["denoising_loss"] for line in single[3:6]) / 3)
    assert triple[1]["loss"] == pytest.approx(sum(line["loss"] for line in single[3:6]) / 3)


def test_utilisation_counts_the_projectors_of_the_steps_that_run_them(
    shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_window, "peak_flops", lambda device: 1e9)
    config = micro(shared_tiny_store, tmp_path, steps=9, **STOPPED, **{"log.every": 3})
    train(config)
    run = open_run(tmp_path)
    run.data.close()
    aligned, plain = (3 * forward_flops_per_image(run.geometry, projected) for projected in (True, False))
    assert aligned > 1.05 * plain
    counted = [line["mfu"] * 1e9 / line["images_per_s"] for line in read_metrics(tmp_path)]
    assert counted == pytest.approx([aligned, (aligned + 2 * plain) / 3, plain])


def test_reg_logs_the_class_token_s_loss(shared_tiny_store: Path, tmp_path: Path) -> None:
    train(micro(shared_tiny_store, tmp_path, steps=2, **REG))
    for line in read_metrics(tmp_path):
        parts = line["denoising_loss"] + 0.03 * line["class_denoising_loss"] + 0.5 * line["alignment_loss"]
        assert line["loss"] == pytest.approx(parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.projection_weight": (0.0,), **STOPPED}, "--loss.stop-alignment-at 4 has nothing to stop with"),
        ({"loss.projection_weight": (0.0,), **REG}, "--model.class-token true needs features"),
        ({**REG, "model.kind": "dit", "sample.sampler": "ddpm"}, "goes with --model.kind sit"),
        ({**REG, "loss.alignment": ("irepa",)}, "IREPA aligns patch tokens only"),
        ({**REG, "sample.guidance_channels": 3}, "is for models without class token"),
        ({"sample.guidance_channels": 5}, "must be at most the latents' 4 channels, got 5; pass .* 0 for all of them"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    changes: dict[str, Any], message: str, shared_tiny_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(micro(shared_tiny_store, tmp_path, steps=1, **changes))


@pytest.fixture(scope="module")
def trained(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each method."""
    root = tmp_path_factory.mktemp("trained")
    for method in ("reg", "irepa", "lightningdit"):
        train(micro(shared_tiny_store, root / method, steps=2, **METHODS[method]))
    return {method: root / method for method in ("reg", "irepa", "lightningdit")}


@pytest.mark.parametrize("method", ["reg", "irepa", "lightningdit"])
def test_what_follows_a_training_knows_the_method(method: str, trained: dict[str, Path], tmp_path: Path) -> None:
    run = trained[method]
    config = GenerateConfig(
        run=run, out=tmp_path / "images", n=4, batch=2, steps=2, vae=str(TINY_VAE), device="cpu", guidance=1.5
    )
    folder, _ = generate(config)
    assert n_written(folder) == 4
    (point, *_) = sweep(run, SweepConfig(n=20, k=3, device="cpu", batch=8), ["cknna", "probe"])["points"]
    assert 0 <= point["probe"] <= 1
    assert export(run, "safetensors", tmp_path / "safetensors", "latest")
    if method == "irepa":
        assert export(run, "diffusers", tmp_path / "diffusers", "latest")
    else:
        with pytest.raises(UserError, match="for which diffusers has no class; export it with --to safetensors"):
            export(run, "diffusers", tmp_path / "diffusers", "latest")
    (page,) = write_report(list(trained.values()), tmp_path / "report.html", "")
    assert method in page.read_text()


def test_a_class_token_is_guided_as_the_image_unless_said(
    trained: dict[str, Path], shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """REG's figures have one scale for both; a run that was saved with a number keeps it until --guidance is given."""
    run = tmp_path / "run"
    shutil.copytree(trained["reg"], run)

    def drawn(**changes: Any) -> tuple[str, dict[str, Any]]:
        given = {"run": run, "n": 2, "batch": 2, "steps": 2, "vae": str(TINY_VAE), "device": "cpu", **changes}
        folder, _ = generate(GenerateConfig(**given))
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["card"].pop("guidance_class") == settings["sample.guidance_class"]
        return folder.name, settings

    name, record = drawn(guidance=9.0)
    assert name == "samples-0000002-ode2-guidance9-seed0"
    assert (record["sample.guidance"], record["sample.guidance_class"]) == (9.0, 9.0)
    assert "guidance 9 of the image and 9 of the class token for t from 0 to 1" in capsys.readouterr().err
    name, record = drawn(guidance=9.0, guidance_class=0.0)
    assert (name, record["sample.guidance_class"]) == ("samples-0000002-ode2-guidance9-class0-seed0", 0.0)
    assert "guidance 9 of the image and none of the class token" in capsys.readouterr().err

    config = run / "config.yaml"
    config.write_text(config.read_text().replace("guidance_class: -1.0", "guidance_class: 2.3"))
    assert drawn(out=tmp_path / "run-s")[1]["sample.guidance_class"] == 2.3
    assert drawn(guidance=9.0, out=tmp_path / "both")[1] == {**record, "sample.guidance_class": 9.0}
    drawn(guidance=9.0, guidance_class=0.0, guidance_class_low=0.1)
    assert "none of the class token for t from 0 to 1\n" in capsys.readouterr().err
    name, record = drawn(guidance=9.0, guidance_class_low=0.1, guidance_class_high=0.8)
    assert name.endswith("-guidance9-seed0-guidance-class-low0.1-guidance-class-high0.8")
    assert (record["sample.guidance_class_low"], record["sample.guidance_class_high"]) == (0.1, 0.8)
    assert "for t from 0 to 1, of the class token from 0.1 to 0.8" in capsys.readouterr().err
    for option in ("guidance-class", "guidance-class-low", "guidance-class-high"):
        with pytest.raises(UserError, match=rf"^--{option} 0.5 is of a class token; \S+ has none$"):
            drawn(run=trained["irepa"], **{option.replace("-", "_"): 0.5})
    with pytest.raises(UserError, match=r"^--class-noise own is of a class token; \S+ has none$"):
        drawn(run=trained["irepa"], class_noise="own")
    with pytest.raises(UserError, match=r"^--guidance-class 3.0 has no effect with --guidance 1, without"):
        drawn(guidance=1.0, guidance_class=3.0)

    capsys.readouterr()
    train(micro(shared_tiny_store, tmp_path / "new", steps=1, **REG, **{"sample.guidance": 1.8}))
    line = "samples    ode in 50 steps, guidance 1.8 of the image and 1.8 of the class token for t from 0 to 1"
    assert line in capsys.readouterr().out.splitlines()


def test_hidden_states_of_reg_are_of_the_patches(trained: dict[str, Path]) -> None:
    """At t = 0 the class token is the stored one, whatever the noise; the mean is of the tokens behind it."""
    run = open_run(trained["reg"])
    samples = open_samples(run, SweepConfig(n=3))
    model = load_model(run, newest(run.path), "ema", torch.device("cpu"))
    found = pooled_hidden_states(
        model, run, samples.latents, samples.rows, 0.0, [1], seed=0, batch=3, device=torch.device("cpu"),
        class_tokens=samples.class_tokens,
    )[1]  # fmt: skip
    assert samples.class_tokens is not None
    moments, class_tokens = (
        read_rows(group, name, samples.rows)
        for group, name in ((samples.latents, "moments"), (samples.class_tokens, "cls"))
    )
    x_t, t = noisy_latents(moments, samples.rows, 0.0, run, 0, class_tokens)
    assert torch.equal(split(x_t, run.geometry)[1], class_tokens.float())
    null = torch.full((3,), run.geometry.n_classes)
    with torch.no_grad():
        condition = model.t_embedder(t) + model.y_embedder(null)  # type: ignore[operator]
        tokens = model.blocks[0](model.embed(x_t), condition)  # type: ignore[index, operator]
    torch.testing.assert_close(found, tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    run.data.close()
    samples.close()


def test_a_class_token_that_is_not_finite_is_left_out_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = StoreLayout(n_rows=40, views=("original",), resolution=128, shard_rows=16)
    class_tokens = random_arrays(make_layouts(layout)[FEATURES], seed=1)["cls"]
    class_tokens[17] = np.inf
    make_store(tmp_path / "store", features={"cls": class_tokens})
    changes = {**REG, "loss.projection_weight": (0.5,), "model.align_block": (1,)}
    train(micro(tmp_path / "store", tmp_path / "run", steps=5, **changes))
    (line,) = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "left out" in line]
    assert "rows [17]; left out, 1 of at most 10" in line
    assert "class token's" in line


def test_a_signal_at_the_stop_ends_the_run_there(
    shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a step later, in the part of the run that has no alignment."""
    take = loop.train_step

    def signalled(training: Any, batch: Any, *, stop: bool) -> Any:
        return take(training, batch, stop=stop or batch.step == STOP - 1)

    monkeypatch.setattr(loop, "train_step", signalled)
    train(micro(shared_tiny_store, tmp_path, steps=STEPS, **STOPPED, **{"checkpoint.every": STOP}))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, STOP + 1))
    assert not read_state(newest(tmp_path)).alignment_stopped
