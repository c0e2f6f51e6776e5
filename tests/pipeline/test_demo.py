"""The demo: its two runs differ in the alignment only, its table says what the runs' files say, and all of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import demo
from pipeline.precompute import Summary
from pipeline.sources.glyphs import CLASSES, write_glyphs
from storage.feature_file import write_feature_file
from storage.identity import VectorsIdentity


def summary(store: Path, encoded: int = 8) -> Summary:
    return Summary(
        **{"store": str(store), "images": 20, "units": 8, "units_encoded": encoded, "units_given_up": {}},
        **{"images_encoded": 20, "images_failed": 0, "failures": "", "failures_mended": "", "seconds": 5.0},
        **{"images_per_s": 4.0, "bytes_per_image": {"latents/tiny-vae": 1044}, "device": "cpu", "encoder_busy": 1.0},
        **{"bound": "", "object_store_peak_bytes": 0},
    )  # type: ignore[arg-type]


def write_run(run: Path, **losses: float) -> None:
    """The files of a run that the table reads."""
    first, last = ({"denoising_loss": value, "alignment_loss": losses["alignment"] * value} for value in (2.0, 1.0))
    files: dict[str, Any] = {
        "summary.json": {"steps": 800, "steps_now": 800, "first": first, "last": last},
        "evaluations.jsonl": {"metrics": {"fd": {"value": losses["fd"], "n_generated": 120}}},
        "analysis/probe.json": {"points": [{"block": 1, "probe": 0.5}, {"block": 3, "probe": losses["probe"]}]},
        "analysis/cknna.json": {"points": [{"block": 2, "cknna": 0.25}]},
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))


def test_the_runs_are_equal_but_for_the_alignment() -> None:
    trainings = {name: demo._chain(Path("/out") / name, "/store", 7)[0] for name in demo.RUNS}
    assert list(trainings) == ["repa", "vanilla"]
    own = {name: demo.RUNS[name] for name in trainings}
    shared = [line[: -len(own[name])] for name, line in trainings.items()]
    for line in shared:
        line[line.index("--run") + 1] = "RUN"
    assert shared[0] == shared[1]
    assert own["vanilla"] == ["--loss.projection-weight", "0"]


def test_the_table_has_the_runs_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path / "repa", alignment=-0.5, fd=1.25, probe=0.875)
    write_run(tmp_path / "vanilla", alignment=0.0, fd=2.5, probe=0.75)
    named = {"repa": 0.9, "vanilla": 0.8}
    shown = demo.report(summary(tmp_path / "store"), tmp_path, named, [tmp_path / "report.html"], 250.0)
    rows = {line[: line.find("  ")]: line.split() for line in shown.splitlines() if "  " in line.strip()}
    assert rows["seconds in all"][-1] == "250"
    assert rows["report.html"][-1] == str(tmp_path / "report.html")
    assert rows["Fréchet distance, glyph-namer, 120 images"][-2:] == ["1.250", "2.500"]
    assert rows["samples that a probe names as asked"][-2:] == ["90%", "80%"]
    assert "87.5% (block 3)" in shown
    assert rows["alignment loss"][-4:] == ["-1.000", "→", "-0.500", "–"]


def test_the_share_named_is_of_images_whose_features_are_their_digit_s(tmp_path: Path) -> None:
    """Half of a run's images look like the digit after the one that was asked for."""
    identity = VectorsIdentity(name="glyph-namer", vector="mean")
    rng = np.random.default_rng(0)
    images = {name: tmp_path / name for name in (*demo.RUNS, "heldout")}
    write_glyphs(images["heldout"], n_per_class=4, split="heldout")
    looks = {"heldout": np.repeat(np.arange(10), 4), "repa": np.arange(20) % 10}
    looks["vanilla"] = np.where(np.arange(20) < 10, looks["repa"], (looks["repa"] + 1) % 10)
    files = {}
    for name, digits in looks.items():
        features = np.eye(len(CLASSES), dtype=np.float32)[digits] + 0.01 * rng.standard_normal((len(digits), 10))
        files[name] = tmp_path / f"{name}.npz"
        record = {"n": len(digits)}
        write_feature_file(files[name], {"features": features.astype(np.float32)}, identity, record)
    for name in demo.RUNS:
        images[name].mkdir()
        (images[name] / "labels.txt").write_text("".join(f"{i % 10}\n" for i in range(20)))
    assert demo.shares_named(files, images) == {"repa": 1.0, "vanilla": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(900)  # some twenty processes
def test_all_of_it_runs_and_a_second_time_reuses_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"N_PER_CLASS": 3, "N_HELDOUT_PER_CLASS": 2, "IMAGES": 12, "SAMPLING_STEPS": 2, "PROBED": 30}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for reused in (False, True):
        assert demo.run_demo(tmp_path, steps=2) == 0
        shown = capsys.readouterr().out
        assert ("nothing was encoded" in shown) == reused
        assert "samples that a probe names as asked" in shown
    page = (tmp_path / "report.html").read_text()
    assert "Fréchet distance (glyph-namer-mean)" in page
    assert page.count("data:image/png;base64") >= 2
