"""The study of REPA: arms are runs that the trainer takes, the control is what it says, figures are read right."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import repa_effect
from benchmarks.effect import arms as arms_module
from benchmarks.effect import heldout_loss as heldout_loss_module
from benchmarks.effect import measure as measure_module
from benchmarks.effect.arms import SCALES, VANILLA, Run, arms, interleaved, variants
from benchmarks.effect.constant_cosine import constant_cosine
from benchmarks.effect.control import is_whole, others_of_the_class, write_control
from benchmarks.effect.heldout_loss import TIMES, heldout_loss
from benchmarks.effect.measure import ALIGNED_EYES, Setting, machines, note_machine, note_machines_of
from benchmarks.effect.report import collect, less_vanilla, read_by_t, steps_to_reach, write_report
from benchmarks.repa_effect import Commands, StoppedError, train_command
from storage import open_store
from storage.base.errors import UserError
from tests.stores import FEATURES, make_store
from tests.trainer.runs import assert_same_run, micro
from trainer.config.command_line import train_config
from trainer.loop.train import train
from trainer.run.opened import checkpoints_of, open_run

OF_ARMS = arms("middle", "final", "other")
WITH_VARIANTS = {**OF_ARMS, **variants("middle")}


def setting(out: Path) -> Setting:
    return Setting(
        out=out,
        train_store=out / "train",
        heldout_store=out / "heldout",
        features="middle",
        encoder="tiny-vit",
        encoder_weights=None,
        second_weights=None,
        n_images=8,
        measures=out / "measures",
    )


def config_of(arm: str, out: Path, of_study: Setting | None = None) -> Any:
    options = train_command(Run(arm=arm, seed=0), WITH_VARIANTS[arm], of_study or setting(out), 100, 50)[2:]
    pairs = (option.removeprefix("--").split("=", 1) for option in options)
    return train_config({name.replace("-", "_"): text for name, text in pairs})


@pytest.mark.parametrize("name", OF_ARMS)
def test_every_arm_is_a_run_that_differs_from_vanilla_in_its_alignment_only(name: str, tmp_path: Path) -> None:
    mine, vanilla = config_of(name, tmp_path), config_of(VANILLA, tmp_path)
    assert dataclasses.replace(mine.model, class_token=False) == vanilla.model
    assert mine.model.class_token == name.startswith("reg")
    assert (mine.optim, mine.batch, mine.seed, mine.steps) == (vanilla.optim, vanilla.batch, vanilla.seed, 100)
    assert not vanilla.aligns
    assert mine.aligns == (name != "vanilla")


@pytest.mark.parametrize("name", OF_ARMS)
def test_at_the_larger_scale_arms_are_sit_b_2_and_differ_in_the_same(name: str, tmp_path: Path) -> None:
    of_study = dataclasses.replace(setting(tmp_path), common=SCALES["base"])
    mine, vanilla = (config_of(arm, tmp_path, of_study) for arm in (name, VANILLA))
    assert (mine.model.width, mine.model.depth, mine.batch) == (768, 12, 256)
    assert dataclasses.replace(mine.model, class_token=False) == vanilla.model
    assert (mine.optim, mine.seed, mine.steps) == (vanilla.optim, vanilla.seed, 100)


def test_an_arm_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"--{name}={tmp_path}/{name}" for name in ("data", "heldout", "vae", "out")]
    with pytest.raises(SystemExit):
        repa_effect.main([*paths, "--scale", "base", "--arms", "repa", "repa-wide"])
    assert "--arms repa-wide: the arms of --scale base are vanilla, repa" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, arm in WITH_VARIANTS.items() if arm.beside])
def test_a_variant_differs_from_the_arm_beside_it_in_its_alignment_only(name: str, tmp_path: Path) -> None:
    mine, other = config_of(name, tmp_path), config_of(WITH_VARIANTS[name].beside, tmp_path)
    of_alignment = {"align_block": other.model.align_block, "projector_width": other.model.projector_width}
    assert dataclasses.replace(mine.model, **of_alignment) == other.model
    assert (mine.optim, mine.batch, mine.seed) == (other.optim, other.batch, other.seed)
    assert mine.aligns
    assert not other.aligns


def test_a_variant_ends_before_the_arms_and_no_image_is_drawn_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = WITH_VARIANTS["repa-weight-2"].until
    assert until
    order = interleaved(WITH_VARIANTS, (until, until + 1))
    assert {run.arm for step, run in order if step > until} == set(OF_ARMS)
    assert {run.arm for step, run in order if step == until} == set(WITH_VARIANTS)
    drawn = {}
    monkeypatch.setattr(repa_effect, "measure", lambda _, run, *__, draws: drawn.update({run.name: draws}))
    monkeypatch.setattr(Commands, "__call__", lambda *_: None)
    commands = Commands(tmp_path / "log", 1, math.inf)
    for name in ("repa", "repa-weight-2"):
        run = Run(arm=name, seed=0)
        repa_effect.stage(run, WITH_VARIANTS[name], setting(tmp_path), until, [until], commands)
    assert drawn == {"repa-seed0": True, "repa-weight-2-seed0": False}


def test_variants_stand_in_a_table_of_their_own_beside_runs_of_the_same_seed(tmp_path: Path) -> None:
    for name, loss in (("vanilla", 1.0), ("repa", 0.9), ("vanilla-larger", 0.8), ("repa-larger", 0.5)):
        write_loss(tmp_path, f"{name}-seed0", 2000, loss)
    write_loss(tmp_path, "vanilla-seed1", 2000, 1.0)
    write_loss(tmp_path, "repa-seed1", 2000, 0.3)
    of_arms, other = write_report(tmp_path / "r" / "effect", tmp_path, WITH_VARIANTS, "title", []).split(
        "### Other settings"
    )
    assert "| REPA − vanilla | -0.4000, better in 2 of 2 |" in of_arms
    assert "9 M" not in of_arms
    assert "| vanilla | 1.0000 |" in other
    assert "| REPA | 0.9000 (-0.1000) |" in other
    assert "| vanilla of 9 M parameters | 0.8000 |" in other
    assert "| REPA of 9 M parameters, not 3.5 | 0.5000 (-0.3000) |" in other


def test_all_runs_reach_a_milestone_before_any_goes_on_and_first_seeds_go_first() -> None:
    order = interleaved(OF_ARMS, (2000, 1000))
    runs = [Run(arm=name, seed=seed) for name, arm in OF_ARMS.items() for seed in arm.seeds]
    assert [step for step, _ in order] == [1000] * len(runs) + [2000] * len(runs)
    assert {run for _, run in order[: len(runs)]} == set(runs)
    assert [run.seed for _, run in order[: len(runs)]] == sorted(run.seed for run in runs)


def test_what_is_measured_elsewhere_is_not_done_again_and_a_run_is_brought_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_study = setting(tmp_path)
    for name in ("heldout_loss", "probe", "cknna", ALIGNED_EYES):
        folder = of_study.folder("vanilla-seed0", 20)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text("{}")
    done: list[str] = []
    monkeypatch.setattr(repa_effect, "measure", lambda _, run, step, command, draws: None)
    monkeypatch.setattr(repa_effect, "latest_checkpoint", lambda run: None)
    commands = Commands(tmp_path / "log", 1, math.inf)
    monkeypatch.setattr(Commands, "__call__", lambda _, words: done.extend(w for w in words if "--run=" in w))
    two = {name: OF_ARMS[name] for name in ("vanilla", "reg")}
    assert not repa_effect.work(of_study, two, [10, 20], 1, commands, run_by_run=True)
    runs = [path.rpartition("/")[2] for path in done]
    assert runs == ["vanilla-seed0", *["reg-seed0"] * 2, *["vanilla-seed1"] * 2, *["vanilla-seed2"] * 2]


def test_a_run_that_begins_as_another_s_is_the_one_that_is_trained_from_the_start(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, n_rows=12)
    stopped = {"loss.stop_alignment_at": 3, "steps": 5}
    kept = {"checkpoint.every": 1, "checkpoint.milestone_every": 3}
    train(micro(store, tmp_path / "whole", **stopped, **kept))
    train(micro(store, tmp_path / "origin", steps=5, **kept))
    assert repa_effect.begin_as(tmp_path / "begun", tmp_path / "origin", 3)
    train(micro(store, tmp_path / "begun", **stopped, **kept), accept_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "begun")
    assert not repa_effect.begin_as(tmp_path / "begun", tmp_path / "origin", 3), "it has gone on"
    assert not repa_effect.begin_as(tmp_path / "other", tmp_path / "origin", 2), "no such checkpoint"


def test_until_it_differs_an_arm_s_measures_are_the_other_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_study = setting(tmp_path)
    for name in ("heldout_loss", "probe", "cknna"):
        folder = of_study.folder("repa-seed0", 1000)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(f'"{name}"')
    commands = Commands(tmp_path / "log", 1, math.inf)
    monkeypatch.setattr(Commands, "__call__", lambda _, words: pytest.fail(f"{words} is not to run"))
    run = Run(arm="repa-stopped", seed=0)
    repa_effect.stage(run, OF_ARMS[run.arm], of_study, 1000, [1000, 8000], commands)
    assert (of_study.folder(run.name, 1000) / "probe.json").read_text() == '"probe"'


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), usable=st.data(), seed=st.integers(0, 100)
)  # fmt: skip
def test_a_row_is_given_another_of_its_class_and_each_is_given_once(labels: list[int], usable: Any, seed: int) -> None:
    flags = np.array(usable.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))))
    of = np.array(labels)
    donors = others_of_the_class(of, flags, seed)
    assert (donors[~flags] == -1).all()
    assert sorted(donors[flags]) == np.flatnonzero(flags).tolist()
    assert (of[donors[flags]] == of[flags]).all()
    alone = {row for row in np.flatnonzero(flags) if (of[flags] == of[row]).sum() == 1}
    assert {row for row in np.flatnonzero(flags) if donors[row] == row} == alone


def test_the_control_holds_another_row_s_features_in_every_view(tmp_path: Path) -> None:
    where = tmp_path / "store"
    made = make_store(where, n_rows=20, n_views=2, shard_rows=8, n_classes=3, failed_rows=[4])[FEATURES]
    assert not is_whole(where, "other")
    write_control(where, "tiny-vit", "other", seed=1)
    write_control(where, "tiny-vit", "other", seed=1)  # again: nothing to do
    assert is_whole(where, "other")
    store = open_store(where)
    group = store.group("features/other")
    assert group.failed_rows.tolist() == [4]
    assert group.identity_digest != store.group(FEATURES).identity_digest
    labels = store.classes.labels
    donors = others_of_the_class(labels, np.arange(20) != 4, 1)
    rows = np.flatnonzero(donors >= 0)
    assert (donors[rows] != rows).all()
    for name, array in made.items():
        for view in range(2):
            read = np.empty((len(rows), *array.shape[2:]), dtype=array.dtype)
            group[name].read_into(rows, view, read)
            np.testing.assert_array_equal(read, array[donors[rows], view])
    group.close()


def test_the_loss_of_a_model_that_says_nothing_is_the_velocity_s_square_at_every_time(tmp_path: Path) -> None:
    """A model's output begins as zero, so the loss is E‖ε − x‖², whatever t is."""
    make_store(tmp_path / "store", n_rows=12)
    make_store(tmp_path / "heldout", n_rows=70)
    train(micro(tmp_path / "store", tmp_path / "run", **{"optim.lr": 1e-30, "steps": 1}))
    run = open_run(tmp_path / "run")
    found = heldout_loss(run, checkpoints_of(tmp_path / "run")[0], str(tmp_path / "heldout"), torch.device("cpu"))
    run.data.close()
    assert tuple(found) == TIMES
    assert np.ptp(list(found.values())) < 1e-5
    # Mean and deviation are standard normal, halved: x has variance (1 + 1) / 4, the noise one.
    assert found[TIMES[0]] == pytest.approx(1.5, rel=0.03)


def test_the_loss_of_fewer_images_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store", n_rows=5)
    train(micro(tmp_path / "store", tmp_path / "run", steps=2))
    run = open_run(tmp_path / "run")
    checkpoint, store = checkpoints_of(tmp_path / "run", "2")[0], str(tmp_path / "store")

    def loss(n: int) -> np.ndarray:
        return np.array(list(heldout_loss(run, checkpoint, store, torch.device("cpu"), n).values()))

    of_three, of_all = loss(3), loss(0)
    np.testing.assert_array_equal(of_all, loss(9))
    of_row = []
    for row in range(5):
        monkeypatch.setattr(heldout_loss_module, "spread", lambda total, n, row=row: np.array([row]))
        of_row.append(loss(1))
    np.testing.assert_allclose(of_three, np.mean([of_row[0], of_row[2], of_row[4]], 0), rtol=1e-5)
    np.testing.assert_allclose(of_all, np.mean(of_row, 0), rtol=1e-5)
    assert np.abs(of_three - of_all).max() > 1e-3
    run.data.close()


def test_the_loss_of_a_model_with_a_class_token_is_that_of_its_latents(tmp_path: Path) -> None:
    make_store(tmp_path / "store", n_rows=12)
    make_store(tmp_path / "heldout", n_rows=70)
    options = {"optim.lr": 1e-30, "steps": 1, "data.features": ("tiny-vit",), "model.class_token": True}
    train(micro(tmp_path / "store", tmp_path / "run", **options))
    run = open_run(tmp_path / "run")
    found = heldout_loss(run, checkpoints_of(tmp_path / "run")[0], str(tmp_path / "heldout"), torch.device("cpu"))
    run.data.close()
    assert np.ptp(list(found.values())) < 1e-5
    assert found[TIMES[0]] == pytest.approx(1.5, rel=0.03)


@given(
    values=st.lists(st.floats(0, 10), min_size=2, max_size=8),
    target=st.floats(0, 10),
    less_is_better=st.booleans(),
)
def test_steps_to_reach_is_where_the_line_first_is_as_good(
    values: list[float], target: float, less_is_better: bool
) -> None:
    curve = {1000 * (i + 1): value for i, value in enumerate(values)}
    good = [step for step, value in curve.items() if (value <= target if less_is_better else value >= target)]
    step = steps_to_reach(curve, target, less_is_better=less_is_better)
    assert (step is None) == (not good)
    if step is not None and good[0] > 1000:
        assert good[0] - 1000 <= step <= good[0]
        assert np.interp(step, list(curve), values) == pytest.approx(target, abs=1e-6)


def write_loss(measures: Path, run: str, step: int, mean: float) -> None:
    folder = measures / run / f"{step:07d}"
    folder.mkdir(parents=True)
    by_t = dict.fromkeys(TIMES, mean)
    (folder / "heldout_loss.json").write_text(json.dumps({"mean": mean, "by_t": by_t}))


def test_the_report_has_what_is_there_with_signs_and_steps_to_reach(tmp_path: Path) -> None:
    measures = tmp_path / "measures"
    for seed, gain in ((0, 0.1), (1, -0.02)):
        for step, loss in ((1000, 0.9), (2000, 0.7)):
            write_loss(measures, f"vanilla-seed{seed}", step, loss)
            write_loss(measures, f"repa-seed{seed}", step, loss - gain)
    figures = collect(measures, OF_ARMS)
    assert figures["loss"]["repa"][1000] == {0: pytest.approx(0.8), 1: pytest.approx(0.92)}
    text = write_report(tmp_path / "results" / "effect", measures, OF_ARMS, "title", ["about"])
    assert "-0.0400, better in 1 of 2" in text
    assert "| steps vanilla needs for REPA's | 1,200 | > 2,000 |" in text
    files = {"effect.md", "effect.json", "effect.svg", "effect_difference.svg"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == files
    assert json.loads((tmp_path / "results" / "effect.json").read_text())["figures"]["loss"]["vanilla"]["1000"]


def test_steps_to_reach_compare_the_seeds_that_both_have(tmp_path: Path) -> None:
    """A seed of vanilla alone, much better by chance, moves neither the difference nor the steps."""
    for step, loss in ((1000, 0.9), (2000, 0.7)):
        write_loss(tmp_path, "vanilla-seed0", step, loss)
        write_loss(tmp_path, "repa-seed0", step, loss - 0.1)
        write_loss(tmp_path, "vanilla-seed1", step, loss - 0.6)
    text = write_report(tmp_path / "r" / "effect", tmp_path, OF_ARMS, "title", [])
    assert "| REPA − vanilla | -0.1000, better in 1 of 1 | -0.1000, better in 1 of 1 |" in text
    assert "| steps vanilla needs for REPA's | 1,500 | > 2,000 |" in text
    by_t = {name: read_by_t(tmp_path, name, (0, 1, 2)) for name in ("vanilla", "repa")}
    assert list(less_vanilla(by_t, "repa", 2000)) == list(TIMES)
    assert list(less_vanilla(by_t, "repa", 2000).values()) == pytest.approx([-0.1] * len(TIMES))
    assert less_vanilla(by_t, "vanilla", 2000) == dict.fromkeys(TIMES, 0.0)
    assert less_vanilla(by_t, "repa", 3000) == {}


def test_the_report_says_which_run_was_measured_on_which_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_study = setting(tmp_path)
    for name, run in (("one", "vanilla-seed0"), ("one", "repa-seed0"), ("two", "repa-seed0"), ("two", "repa-seed0")):
        (of_study.measures / run).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(measure_module, "machine_in_short", lambda name=name: name)
        note_machine(of_study, run)
    runs = ["vanilla-seed0", "repa-seed0", "reg-seed0"]
    assert machines(of_study.measures, runs) == ["one: vanilla-seed0, repa-seed0.", "two: repa-seed0."]
    note_machines_of(of_study, "reg-seed0", "repa-seed0")
    assert machines(of_study.measures, runs)[1] == "two: repa-seed0, reg-seed0."


def test_a_report_of_nothing_says_nothing(tmp_path: Path) -> None:
    assert "###" not in write_report(tmp_path / "r" / "effect", tmp_path, OF_ARMS, "title", [])


def test_commands_end_when_told_and_say_what_failed(tmp_path: Path) -> None:
    command = Commands(tmp_path / "log", 1, math.inf)
    command(["this"])
    with pytest.raises(UserError, match="status 1"):
        command(["no_such_module_at_all"])
    command.stop()
    with pytest.raises(StoppedError):
        command(["this"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_study_on_built_in_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three arms, two milestones, all measures; then a later milestone only adds to them."""
    from pipeline.encoders.tiny import TINY_VAE
    from pipeline.sources.photos import write_photos

    small = {"model.depth": "2", "model.width": "32", "model.heads": "2", "model.projector-width": "32", "batch": "8"}
    monkeypatch.setitem(arms_module.SCALES, "small", arms_module.COMMON | small)
    for split, n in (("train", 4), ("heldout", 2)):
        write_photos(tmp_path / split, n_per_class=n, split=split)
    options = [
        f"--data={tmp_path}/train", f"--heldout={tmp_path}/heldout", f"--vae={TINY_VAE}", "--encoder=tiny-vit",
        "--final=tiny-vit", f"--out={tmp_path}/out", "--images=4", "--arms", "vanilla", "repa", "reg",
        f"--results={tmp_path}/results/effect", "--milestones",
    ]  # fmt: skip
    assert repa_effect.main([*options, "2"]) == 0
    first = sorted((tmp_path / "out" / "measures").rglob("*.json"))
    assert len(first) == 7 * 4
    times = [path.stat().st_mtime_ns for path in first]
    assert repa_effect.main([*options, "2", "4"]) == 0
    assert [path.stat().st_mtime_ns for path in first] == times
    assert (tmp_path / "out" / "measures" / "repa-seed2" / "0000004" / f"{ALIGNED_EYES}.json").is_file()
    assert "4 steps" in (tmp_path / "results" / "effect.md").read_text()


@given(tokens=arrays(np.float64, (6, 3, 4), elements=st.floats(0.1, 1)), seed=st.integers(0, 9))
def test_a_constant_s_cosine_is_reached_by_the_mean_s_direction_and_by_no_other(tokens: np.ndarray, seed: int) -> None:
    labels = np.array([0, 1, 0, 1, 1, 0])
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)

    def best(of: np.ndarray, axis: Any) -> float:
        mean = of.mean(axis, keepdims=True)
        return float((of * mean / np.linalg.norm(mean, axis=-1, keepdims=True)).sum(-1).mean())

    found = constant_cosine(tokens, labels)
    by_class = (best(units[labels == 0], 0) + best(units[labels == 1], 0)) / 2  # as many of each
    assert found == pytest.approx((best(units, (0, 1)), best(units, 0), by_class))
    assert sorted(found) == list(found)
    other = np.random.default_rng(seed).normal(size=(3, 4))
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    assert (units * other).sum(-1).mean() <= found[1] + 1e-12
