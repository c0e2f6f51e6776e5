"""A sweep measures the rows it says, of the store it says; what does not fit is one clear line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.stores
from storage import open_store
from storage.base.errors import UserError
from storage.codecs.int8 import INT8
from storage.codecs.int8 import numbers as decode
from storage.identity import Identity
from tests.stores import FEATURES, LATENTS, make_store
from tests.trainer.evaluation.conftest import MICRO
from trainer.__main__ import main
from trainer.config.command_line import train_config
from trainer.evaluation.probing.analyse import write_analysis
from trainer.evaluation.probing.cknna import cknna
from trainer.evaluation.probing.hidden_states import noisy_latents, pooled_hidden_states
from trainer.evaluation.probing.probe import probe
from trainer.evaluation.probing.sweep import SweepConfig, open_samples, parse_blocks, pooled_features, sweep
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.loop.train import train
from trainer.run.opened import checkpoints_of, load_model, open_run

CPU = torch.device("cpu")


def test_points_are_the_measures_of_the_hidden_states(micro_run: Path) -> None:
    config = SweepConfig(blocks="3,1", times=(0.2, 0.7), checkpoints="1,3", n=30, k=5, device="cpu", batch=16)
    found = sweep(micro_run, config, ["probe", "cknna"])
    assert [(p["step"], p["t"], p["block"]) for p in found["points"]] == [
        (step, t, block) for step in (1, 3) for t in (0.2, 0.7) for block in (1, 3)
    ]
    assert found["n"] == 30
    run = open_run(micro_run)
    samples = open_samples(run, config)
    model = load_model(run, checkpoints_of(micro_run, "3")[0], "ema", CPU)
    x = pooled_hidden_states(model, run, samples.latents, samples.rows, 0.7, [3], seed=0, batch=16, device=CPU)[3]
    y = pooled_features(samples.features, samples.rows, 7, CPU)
    last = found["points"][-1]
    assert last["probe"] == probe(x, samples.labels).accuracy
    assert last["cknna"] == pytest.approx(cknna(x, y, 5), abs=1e-6)
    assert found["features"]["probe"] == probe(y, samples.labels).accuracy
    samples.close()
    run.data.close()


def test_what_takes_long_is_said(micro_run: Path, behind_bars: list[str], waits: list[str]) -> None:
    config = SweepConfig(blocks="1,3", times=(0.5,), checkpoints="3", n=30, k=5, device="cpu", batch=16)
    sweep(micro_run, config, ["probe", "cknna"])
    assert behind_bars == [
        f"neighbours of {FEATURES}",
        f"fitting a probe of {FEATURES}",
        "loading step 3",
        "step 3, t = 0.5",
        *(f"step 3, t = 0.5: measuring {i} of 2 blocks" for i in (1, 2)),
        "",
        "micro: probe and cknna: 60/60",
    ]
    assert set(waits) == {"opening the run and its store"}


@pytest.mark.parametrize("codec", [None, INT8])
def test_features_are_averaged_over_patches_quantised_or_not(tmp_path: Path, codec: object) -> None:
    data = make_store(tmp_path / "store", codec=codec)[FEATURES]  # type: ignore[arg-type]
    patches = data["patches"] if codec is None else decode(data["patches"], data["scale"])
    group = open_store(tmp_path / "store").group(FEATURES)
    rows = np.array([0, 7, 39])
    found = pooled_features(group, rows, 2, CPU)
    np.testing.assert_allclose(found, patches[rows, 0].astype(np.float32).mean(axis=1), atol=1e-5)
    group.close()


def test_failed_rows_are_left_out_and_the_choice_is_the_seeds(micro_run: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "store", failed_rows=[3, 20])
    run = open_run(micro_run)

    def rows(**changes: object) -> list[int]:
        samples = open_samples(run, SweepConfig(store=str(tmp_path / "store"), **changes))  # type: ignore[arg-type]
        samples.close()
        assert samples.labels.tolist() == [row % 5 for row in samples.rows]
        return samples.rows.tolist()

    assert rows() == [row for row in range(40) if row not in (3, 20)]
    assert rows(n=9) == sorted(rows(n=9)) == rows(n=9)
    assert rows(n=9) != rows(n=9, seed=1)
    run.data.close()


def make_other_store(root: Path, group: str, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    """A store whose group has other fields in its identity."""
    make = tests.stores.make_identities

    def changed(*args: object) -> dict[str, Identity]:
        identities = make(*args)  # type: ignore[arg-type]
        return identities | {group: dataclasses.replace(identities[group], **fields)}

    with monkeypatch.context() as patch:
        patch.setattr(tests.stores, "make_identities", changed)
        make_store(root)


def test_another_store_must_have_the_same_vaes_latents(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_other_store(tmp_path / "other", LATENTS, monkeypatch, latent_scale_factor=0.25)
    with pytest.raises(UserError, match=r"has other latents than .*latent_scale_factor: 0.5 and 0.25.*same VAE"):
        sweep(micro_run, SweepConfig(store=str(tmp_path / "other")), ["cknna"])


def test_what_other_stores_lack_is_said(micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tests.stores.make_layouts

    def without_patches(*args: object) -> dict[str, object]:
        layouts = make(*args)  # type: ignore[arg-type]
        cls, _ = layouts[FEATURES].arrays
        return layouts | {FEATURES: dataclasses.replace(layouts[FEATURES], arrays=(cls,))}

    with monkeypatch.context() as patch:
        patch.setattr(tests.stores, "make_layouts", without_patches)
        make_store(tmp_path / "cls")
    with pytest.raises(UserError, match="holds cls and no patch tokens"):
        sweep(micro_run, SweepConfig(store=str(tmp_path / "cls"), device="cpu"), ["cknna"])
    make_store(tmp_path / "unlabelled", label=-1)
    unlabelled = SweepConfig(store=str(tmp_path / "unlabelled"), device="cpu", k=5, blocks="1")
    assert sweep(micro_run, unlabelled, ["cknna"])["points"]
    with pytest.raises(UserError, match="without a label; a probe needs one"):
        sweep(micro_run, unlabelled, ["probe"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "dinov2-vitg14"], "has no features/dinov2-vitg14; it has latents/tiny-vae, features/tiny-vit"),
        (["--store", "nowhere"], "nowhere does not exist"),
        (["--blocks", "0,2"], "--blocks must be `all` or numbers from 1 to 3"),
        (["--blocks", "four"], "--blocks must be"),
        (["--times", "1.5"], r"--times must be in \[0, 1\], got 1.5"),
        (["--n", "4"], "CKNNA needs k of at least 2 and more than k samples"),
        (["--checkpoints", "7"], "has no checkpoint of step '7'; it has 1, 2, 3"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    micro_run: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message) as refused:
        main(["cknna", str(micro_run), "--device", "cpu", *options])
    assert "\n" not in str(refused.value)


def test_blocks_are_named_in_any_order() -> None:
    assert parse_blocks("all", 3) == [1, 2, 3]
    assert parse_blocks("3, 1,3", 3) == [1, 3]


def test_the_commands_write_json_and_a_picture_and_print_the_best_block(
    micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for measure in ("probe", "cknna"):
        out = tmp_path / f"{measure}-0.5"
        assert (
            main([measure, str(micro_run), "--k", "5", "--checkpoints", "all", "--out", str(out), "--device", "cpu"])
            == 0
        )
        record = json.loads((tmp_path / f"{out.name}.json").read_text())
        assert len(record["points"]) == 9
        assert all(0 <= point["probe"] <= 1 for point in record["points"] if measure == "probe")
        assert [series["label"] for series in record["panels"][0]["series"]] == [
            f"step {n}, t = 0.5" for n in (1, 2, 3)
        ]
        assert (tmp_path / f"{out.name}.svg").read_text().startswith("<svg ")
        best = max((p for p in record["points"] if p["step"] == 3), key=lambda p: float(p[measure]))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(f"step 3, {record['n']} images")
        assert lines[1].split()[:4] == ["t", "=", "0.5", f"{best[measure]:.4f}"]
        assert lines[1].endswith(f"after block {best['block']} of {record['depth']}")
        assert lines[-1] == f"next: python -m trainer report {micro_run}"


def points_of(record: RunRecord, measure: str) -> list[dict[str, object]]:
    found = record.measured[measure]
    assert found is not None
    written = json.loads((record.path / "analysis" / f"{measure}.json").read_text())["points"]
    assert [(p.step, p.t, p.block, p.value(measure)) for p in found.points] == [
        (p["step"], p["t"], p["block"], p[measure]) for p in written
    ]
    return written


def linked(run: Path, to: Path) -> Path:
    """The same run in a folder that may be written to."""
    to.mkdir()
    for name in ("config.yaml", "latest", "checkpoints"):
        (to / name).symlink_to(run / name)
    return to


def test_the_figures_hold_what_was_measured(micro_run: Path, tmp_path: Path) -> None:
    run, plain = linked(micro_run, tmp_path / "recorded"), linked(micro_run, tmp_path / "micro")
    vit = {"name": "vit", "encoder": {"name": "vit"}, "reference": {"path": "/reference"}}
    lines = [
        {**vit, "step": step, "metrics": {"fd": {"value": 10.0 - step, "n_generated": 9, "n_reference": 9}}}
        for step in (2, 3, 99)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    config = SweepConfig(times=(0.3, 0.6), k=5, device="cpu")
    write_analysis([plain, run], config, tmp_path / "figures")
    motivation, key_idea = (
        json.loads((tmp_path / "figures" / f"{name}.json").read_text()) for name in ("motivation", "key-idea")
    )
    measured = motivation["runs"][0]["points"]
    newest = {(p["t"], p["block"]): p for p in measured if p["step"] == 3}
    by_label = {series["label"]: series for series in motivation["panels"][0]["series"]}
    assert by_label["micro, t = 0.3"]["y"] == [newest[0.3, block]["probe"] for block in (1, 2, 3)]
    over_training = motivation["panels"][2]["series"][0]
    assert over_training["x"] == [1, 2, 3]
    assert over_training["y"][2] == max(newest[0.6, block]["cknna"] for block in (1, 2, 3))
    (against,) = key_idea["panels"][2]["series"]  # only steps that have a checkpoint, only the run with a record
    assert against["y"] == [8.0, 7.0]
    assert against["x"] == over_training["y"][1:]
    for record in read_runs([plain, run]):  # and the report finds it
        assert points_of(record, "probe") == [point for point in measured if "probe" in point]
        assert points_of(record, "cknna") == measured
        found = record.measured["cknna"]
        assert found is not None
        assert found.features.path == FEATURES
    (run / "analysis/probe.json").write_text('{"by": "probe", "points": []}')  # with other options, and hours of work
    (plain / "analysis/cknna.json").write_text('{"by": "analyse", "points": []}')
    write_analysis([plain, run], config, tmp_path / "figures")
    assert points_of(read_runs([run])[0], "probe") == []
    assert points_of(read_runs([plain])[0], "cknna") == measured
    with pytest.raises(UserError, match="named twice"):
        write_analysis([run, run], config, tmp_path / "figures")


def test_runs_that_do_not_compare_are_refused_before_anything_is_measured(
    micro_run: Path, shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro_run = linked(micro_run, tmp_path / "micro")
    make_other_store(tmp_path / "store", FEATURES, monkeypatch, index_digest="another")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = (micro_run / "config.yaml").read_text()
    (elsewhere / "config.yaml").write_text(config.replace(str(shared_tiny_store), str(tmp_path / "store")))
    for part in ("latest", "checkpoints"):
        (elsewhere / part).symlink_to(micro_run / part)
    with pytest.raises(UserError, match=r"micro and elsewhere are of stores whose features/tiny-vit differ.*--store"):
        write_analysis([micro_run, elsewhere], SweepConfig(device="cpu"), tmp_path / "out")
    with pytest.raises(UserError, match="is not a run"):
        write_analysis([micro_run, tmp_path / "none"], SweepConfig(device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (micro_run / "analysis").exists()
    same = SweepConfig(device="cpu", store=str(shared_tiny_store), times=(0.5,), blocks="1")
    write_analysis([micro_run, elsewhere], same, tmp_path / "out")
    assert (tmp_path / "out" / "motivation.svg").is_file()


def test_a_dit_is_measured_at_the_steps_of_its_own(shared_tiny_store: Path, tmp_path: Path) -> None:
    changes = {"model.kind": "dit", "sample.sampler": "ddpm", "steps": "1"}
    train(train_config({**MICRO, **changes, "store": str(shared_tiny_store), "run": str(tmp_path)}))
    found = sweep(tmp_path, SweepConfig(times=(0.0, 0.5, 1.0), blocks="3", device="cpu"), ["cknna"])
    assert [point["t"] for point in found["points"]] == [0, 0.5, 1]
    run = open_run(tmp_path)
    moments = torch.zeros(2, 8, 16, 16)
    times = [noisy_latents(moments, np.array([0, 1]), t, run, 0)[1].tolist() for t in (0.0, 0.5, 1.0)]
    assert times == [[0, 0], [500, 500], [999, 999]]
    run.data.close()
