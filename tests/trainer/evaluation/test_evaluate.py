"""`evaluate` on features whose distances are known, on ADM's layout, through the commands, and where it must refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main as describe
from storage.base.console import run_command
from storage.base.errors import UserError
from storage.base.files import append_line
from storage.feature_file import open_feature_file, write_feature_file
from storage.identity import VectorsIdentity
from tests.archives import write_npz
from tests.inception import write_random_inception
from tests.stores import make_store
from trainer.__main__ import main
from trainer.evaluation.generate.image_files import SETTINGS_FILE, step_drawn_at
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.quality.frechet import frechet_distance, gaussian_of
from trainer.evaluation.quality.inception_score import inception_score
from trainer.evaluation.quality.measures import table
from trainer.evaluation.quality.precision_recall import precision_recall
from trainer.evaluation.quality.record import read_record

VIT = VectorsIdentity(name="vit", encoder="test", weights_sha256="0", vector="cls")
INCEPTION = VectorsIdentity(name="inception", encoder="v3", weights_sha256="1", vector="pool_3", published_weights=True)


def numbers(seed: int, n: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def feature_file(path: Path, identity: VectorsIdentity, **arrays: np.ndarray) -> Path:
    write_feature_file(path, arrays, identity, {"path": path.stem, "n": len(arrays["features"])})
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(generated, reference) of one vision encoder."""
    generated = feature_file(tmp_path / "generated.npz", VIT, features=numbers(0, 60, 5) + 1)
    return generated, feature_file(tmp_path / "reference.npz", VIT, features=numbers(1, 80, 5))


def test_feature_files_are_compared_and_counts_are_published(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate(*files, Description(encoder="ignored"), out=tmp_path / "out", resamples=0)
    x, y = numbers(0, 60, 5) + 1, numbers(1, 80, 5)
    assert result["metrics"]["fd"] == {
        "value": frechet_distance(gaussian_of(x), gaussian_of(y)),
        "n_generated": 60,
        "n_reference": 80,
    }
    expected = precision_recall(y, x)
    assert result["metrics"]["precision"]["value"] == expected.precision
    assert result["metrics"]["recall"] == {"value": expected.recall, "n_generated": 60, "n_reference": 80, "k": 3}
    assert json.loads((tmp_path / "out" / "vit.json").read_text()) == result
    assert any("published figures are of 50,000" in text for text in result["warnings"])
    shown = table(result)
    assert "Fréchet distance (vit)" in shown
    assert "60 generated, 80 reference" in shown
    assert "warning: 60 images" in shown


def test_every_metric_is_named_while_it_is_computed(tmp_path: Path, waits: list[str]) -> None:
    generated, reference = (
        feature_file(
            tmp_path / f"{seed}.npz", INCEPTION, features=numbers(seed, 30, 5), spatial=numbers(seed, 30, 4),
            logits=numbers(seed, 30, 8),
        )
        for seed in (0, 1)
    )  # fmt: skip
    result = evaluate(generated, reference, Description(encoder="inception"), out=tmp_path / "out", resamples=10)
    named = " ".join(waits).lower()
    titles = {"kid": "kid"} | {name: name.replace("_", " ") for name in result["metrics"]}
    assert {"fid", "sfid", "kid", "inception_score", "recall", "coverage"} <= titles.keys()
    assert [title for title in titles.values() if title not in named] == []
    assert any("covariance" in text for text in waits)


def test_published_counts_give_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.quality.evaluate.PUBLISHED_IMAGES", 60)
    one = feature_file(tmp_path / "a.npz", VIT, features=numbers(0, 60, 5))
    assert evaluate(one, one, Description(encoder="vit"), out=tmp_path)["warnings"] == []


def test_an_adm_reference_gives_its_statistics(tmp_path: Path) -> None:
    x, spatial, logits = numbers(0, 50, 6), numbers(1, 50, 4), numbers(2, 50, 9)
    generated = feature_file(tmp_path / "g.npz", INCEPTION, features=x, spatial=spatial, logits=logits)
    mu, factor, mu_s, factor_s = numbers(3, 1, 6)[0], numbers(4, 6, 6), numbers(5, 1, 4)[0], numbers(6, 4, 4)
    statistics = {"mu": mu, "sigma": factor @ factor.T, "mu_s": mu_s, "sigma_s": factor_s @ factor_s.T}
    np.savez(tmp_path / "adm.npz", **statistics)
    result = evaluate(generated, tmp_path / "adm.npz", Description(encoder="inception"), out=tmp_path)
    metrics = result["metrics"]
    assert set(metrics) == {"fid", "sfid", "inception_score"}  # the others need images
    assert metrics["fid"]["value"] == pytest.approx(by_hand(x, mu, statistics["sigma"]), rel=1e-5)
    assert metrics["sfid"]["value"] == pytest.approx(by_hand(spatial, mu_s, statistics["sigma_s"]), rel=1e-5)
    assert metrics["inception_score"]["value"] == inception_score(logits)
    assert metrics["fid"]["n_reference"] is None
    assert "given statistics" in table(result)
    assert "the reference has no images, so there is no precision and no recall" in result["warnings"]
    np.savez(tmp_path / "pooled.npz", mu=mu, sigma=statistics["sigma"])
    without = evaluate(generated, tmp_path / "pooled.npz", Description(encoder="inception"), out=tmp_path)
    assert "sfid" not in without["metrics"]


def by_hand(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    import scipy.linalg

    mine = np.cov(x.astype(np.float64), rowvar=False)
    root = scipy.linalg.sqrtm(mine @ covariance.astype(np.float64))
    shift = x.astype(np.float64).mean(axis=0) - mean
    return float(shift @ shift + np.trace(mine + covariance - 2 * root.real))


def test_weights_that_are_not_the_published_ones_are_told(tmp_path: Path) -> None:
    identity = replace(INCEPTION, published_weights=False)
    arrays = {"features": numbers(0, 9, 3), "spatial": numbers(1, 9, 2), "logits": numbers(2, 9, 4)}
    one = feature_file(tmp_path / "a.npz", identity, **arrays)
    result = evaluate(one, one, Description(encoder="inception"), out=tmp_path)
    assert result["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert any("not the published ones" in text for text in result["warnings"])


def test_a_result_is_recorded_in_the_run_it_is_of(files: tuple[Path, Path], tmp_path: Path, micro_run: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "latest", "checkpoints"):
        (run / name).symlink_to(micro_run / name)
    for step in (None, 2):
        evaluate(*files, Description(encoder="vit"), out=tmp_path, run=run, step=step)
    record = read_record(run)
    assert [line.step for line in record] == [3, 2]  # the newest checkpoint's unless it is said
    assert record[0].metrics["fd"].n_generated == 60
    with pytest.raises(UserError, match="pass --run RUN as well"):
        evaluate(*files, Description(encoder="vit"), out=tmp_path, step=2)
    with pytest.raises(UserError, match="is not a run"):
        evaluate(*files, Description(encoder="vit"), out=tmp_path, run=tmp_path, step=2)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no checkpoint, so the step of these images is unknown"):
        evaluate(*files, Description(encoder="vit"), out=tmp_path, run=tmp_path)
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_images_are_of_the_step_that_generate_noted(micro_run: Path, tmp_path: Path) -> None:
    """Not of the run's newest, which may be a day older than what was drawn from it; in whatever form they come."""
    drawn = tmp_path / "samples-2-guidance1.5"
    drawn.mkdir()
    (drawn / SETTINGS_FILE).write_text(json.dumps({"step": 2}))
    np.savez(drawn.with_name(f"{drawn.name}.npz"), np.zeros((4, 8, 8, 3), dtype=np.uint8))
    described = feature_file(tmp_path / "described.npz", VIT, features=numbers(0, 9, 3))
    for images in (drawn, drawn.with_name(f"{drawn.name}.npz")):
        assert step_drawn_at(images) == 2
    assert step_drawn_at(described) is None
    write_feature_file(tmp_path / "f.npz", {"features": numbers(0, 9, 3)}, VIT, {"path": str(drawn), "n": 9})
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "latest", "checkpoints"):
        (run / name).symlink_to(micro_run / name)
    evaluate(tmp_path / "f.npz", described, Description(encoder="vit"), out=tmp_path, run=run)
    evaluate(tmp_path / "f.npz", described, Description(encoder="vit"), out=tmp_path, run=run, step=1)
    assert [line.step for line in read_record(run)] == [2, 1]


def test_what_cannot_be_compared_is_refused(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated, reference = files
    description = Description(encoder="vit")
    other = feature_file(tmp_path / "other.npz", replace(VIT, weights_sha256="9"), features=numbers(0, 9, 5))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "labels.npz", labels=np.zeros(5))
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    cases: list[tuple[Path, Path, str]] = [
        (generated, other, r"described differently \(weights_sha256: 0 and 9\)"),
        (generated, tmp_path / "statistics.npz", "Inception's statistics and no images; vit needs them"),
        (tmp_path / "statistics.npz", reference, "holds statistics only; name the generated images"),
        (generated, tmp_path / "labels.npz", "holds labels; name a folder of images"),
        (tmp_path / "nowhere", reference, "does not exist and is no folder and no .npz"),
        (tmp_path / "nowhere.npz", reference, r"nowhere\.npz does not exist"),
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        evaluate(generated, reference, Description(encoder="vit", device="cuda"), out=tmp_path)
    for images, against, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate(images, against, description, out=tmp_path)
    with pytest.raises(UserError, match="the reference would be of inception; pass --encoder vit --token cls"):
        evaluate(generated, tmp_path / "images.npz", Description(encoder="inception"), out=tmp_path)


def describe_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that describes images runs in this process: a new one takes seconds to import what it needs."""

    run_process = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[1:4] != ["-m", "pipeline", "features"]:  # libraries start processes too
            return run_process(command, **options)
        with pytest.raises(SystemExit) as end, redirect_stdout(sys.stderr):
            run_command(describe, "python -m pipeline", command[3:])
        assert isinstance(end.value.code, int)
        return subprocess.CompletedProcess(command, end.value.code)

    monkeypatch.setattr("trainer.evaluation.quality.description.subprocess.run", run)


def test_one_command_from_pictures_to_numbers_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder of PNGs against the same pictures, an archive's by the built-in encoder in a process of its own."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    (tmp_path / "png" / "class0").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "png" / "class0" / f"{i:05d}.png")
    np.savez(tmp_path / "same.npz", pictures)
    keys = {"kind": "image-folder", "path": str(tmp_path / "png")}
    make_store(tmp_path / "store", n_rows=8, n_classes=1, source=keys, suffix=".png")
    for reference in (str(tmp_path / "same.npz"), f"file://{tmp_path / 'store'}"):
        options = ["--reference", reference, "--encoder", "tiny-vit", "--device", "cpu"]
        assert main(["evaluate", str(tmp_path / "png"), *options, "--json"]) == 0
        result = json.loads((tmp_path / "png-evaluation" / "tiny-vit.json").read_text())
        assert json.loads(capfd.readouterr().out) == result, "nothing else is printed there"
        assert result["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-6)
        assert (result["metrics"]["precision"]["value"], result["metrics"]["recall"]["value"]) == (1, 1)
        assert result["generated"]["n"] == result["reference"]["n"] == 8
        describe_here(monkeypatch)
    assert result["reference"]["path"] == str(tmp_path / "store")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were started instead of describing; none of them does anything."""
    lines: list[list[str]] = []

    def note(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        lines.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("trainer.evaluation.quality.description.subprocess.run", note)
    return lines


def test_a_bad_reference_is_found_before_any_image_is_described(tmp_path: Path, asked: list[list[str]]) -> None:
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2048), sigma=np.zeros(2048))
    np.savez(tmp_path / "text.npz", mu=np.array("a"), sigma=np.eye(2048))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "narrow.npz").read_bytes()[:300])
    write_npz(tmp_path / "declared.npz", mu=("<f8", (10**12,)), sigma=("<f8", (10**6, 10**6)))
    identity = VectorsIdentity(name="inception", vector="pool_3")
    feature_file(tmp_path / "broken.npz", identity, features=np.full((9, 3), np.nan, np.float32))
    for name in ("narrow", "nan", "shape", "text", "cut", "declared", "broken", "nowhere"):
        with pytest.raises(UserError) as refused:
            evaluate(tmp_path / "images.npz", tmp_path / f"{name}.npz", Description(encoder="inception"))
        assert "\n" not in str(refused.value)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="statistics and no images; tiny-vit needs them"):
        evaluate(tmp_path / "images.npz", tmp_path / "statistics.npz", Description(encoder="tiny-vit"))
    assert asked == []
    reference = feature_file(tmp_path / "reference.npz", identity, features=numbers(0, 9, 3))
    for against in (reference, tmp_path / "images.npz"):  # both sets are one command's, which looks at all before
        with pytest.raises(SystemExit):
            evaluate(tmp_path / "images.npz", against, Description(encoder="inception"))
    assert f"--like={reference}" in asked[0]
    assert asked[1][4:6] == [str(tmp_path / "images.npz")] * 2


def test_a_reference_is_described_once_for_all_runs(tmp_path: Path, asked: list[list[str]], micro_run: Path) -> None:
    """Beside the runs; by --cache elsewhere; and another crop of it is another file."""
    places = []
    for name, options in (("a", {}), ("b", {}), ("b", {"cache": tmp_path / "kept"})):
        run = tmp_path / "runs" / name
        shutil.copytree(micro_run, run, dirs_exist_ok=True)
        (run / "samples-1").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            evaluate(run / "samples-1", tmp_path, Description(encoder="tiny-vit"), **options)  # type: ignore[arg-type]
        places.append(Path(asked[-1][asked[-1].index("--out") + 2]))
    assert places[0] == places[1]
    assert places[0].parent == tmp_path / "runs" / "reference-features"
    assert places[2] == tmp_path / "kept" / places[0].name
    with pytest.raises(SystemExit):
        evaluate(run / "samples-1", tmp_path, Description(encoder="tiny-vit", resolution=8))
    assert Path(asked[-1][asked[-1].index("--out") + 2]) != places[0]


def test_broken_images_and_links_in_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with links and a broken JPEG gives the distance of the same folder without; the broken one is named."""
    describe_here(monkeypatch)
    rng = np.random.default_rng(0)
    for name in ("generated", "plain"):
        (tmp_path / name / "class0").mkdir(parents=True)
        for i in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
            picture.save(tmp_path / name / "class0" / f"{i}.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class0").symlink_to(tmp_path / "plain" / "class0")
    (tmp_path / "linked" / "again").symlink_to(".")
    (tmp_path / "linked" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    results = []
    for name in ("plain", "linked"):
        options = ["--reference", str(tmp_path / name), "--encoder", "tiny-vit", "--device", "cpu"]
        assert main(["evaluate", str(tmp_path / "generated"), *options]) == 0
        results.append(json.loads((tmp_path / "generated-evaluation" / "tiny-vit.json").read_text()))
    plain, linked = results
    assert plain["metrics"] == linked["metrics"]
    assert plain["reference"]["digest"] == linked["reference"]["digest"]
    assert [name for name, _ in linked["reference"]["failed"]] == ["broken.jpg"]
    assert any("1 reference images could not be read" in text for text in linked["warnings"])


def test_a_line_that_a_kill_cut_short_is_lost_and_no_other(tmp_path: Path) -> None:
    line = {"name": "vit", "step": 1, "metrics": {"fd": {"value": 1.0}}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(line) + '\n{"name": "v')
    assert len(read_record(tmp_path)) == 1
    append_line(tmp_path / "evaluations.jsonl", json.dumps({**line, "step": 2}))
    assert [found.step for found in read_record(tmp_path)] == [1, 2]
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(line))  # by hand, without an end
    append_line(tmp_path / "evaluations.jsonl", json.dumps({**line, "step": 2}))
    assert [found.step for found in read_record(tmp_path)] == [1, 2]
    (tmp_path / "evaluations.jsonl").write_text('{"name": "v\n' + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl line 1 is damaged.*remove the line"):
        read_record(tmp_path)


def test_missing_weights_are_one_line_that_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    describe_here(monkeypatch)
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.npz")])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "weights-inception-2015-12-05" in said
    assert str(tmp_path / "hub" / "checkpoints") in said


def test_an_unnamed_path_is_a_forgotten_variable() -> None:
    with pytest.raises(UserError, match="IMAGES is empty; name a path"):
        main(["evaluate", "", "--reference", "x"])


@pytest.mark.slow
def test_inception_against_a_reference_batch_with_images_and_statistics(tmp_path: Path) -> None:
    """ADM's layout: distances to the statistics, precision and recall by the images; all five numbers, one command."""
    weights = write_random_inception(tmp_path / "inception.pth")
    pictures = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "generated.npz", pictures[:6], np.arange(6))
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", pictures[6:], **statistics)
    options = ["--weights", str(weights), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(tmp_path / "generated.npz"), "--reference", str(tmp_path / "adm.npz"), *options]) == 0
    result = json.loads((tmp_path / "out" / "inception.json").read_text())
    assert list(result["metrics"]) == [
        *("fid", "sfid", "inception_score", "kid", "precision", "recall", "density", "coverage")
    ]
    generated = open_feature_file(tmp_path / "out" / "generated-inception.npz")
    (path,) = (tmp_path / "out").glob("adm-*-inception.npz")
    reference = open_feature_file(path)
    x, y = generated.read("features"), reference.read("features")
    mine = np.cov(
        x.astype(np.float64), rowvar=False
    )  # with Σ₂ = 1, tr (Σ₁Σ₂)^½ is the sum of the roots of Σ₁'s spectrum
    roots = np.sqrt(np.linalg.svd((x - x.mean(0, dtype=np.float64)) / np.sqrt(5), compute_uv=False) ** 2).sum()
    expected = (x.mean(axis=0, dtype=np.float64) ** 2).sum() + np.trace(mine) + 2048 - 2 * roots
    assert result["metrics"]["fid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert result["metrics"]["fid"]["n_reference"] is None
    assert result["metrics"]["precision"]["value"] == precision_recall(y, x).precision
    assert result["metrics"]["recall"]["n_reference"] == 8
