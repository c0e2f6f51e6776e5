"""FDr⁶: the published divisors, the mean over six spaces, references by name, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.encoders.tiny import TINY_VAE
from storage.base.choices import FDR6
from storage.base.errors import UserError
from storage.feature_file import write_feature_file
from storage.identity import VectorsIdentity
from tests.commands import run_here
from trainer.__main__ import main
from trainer.evaluation import score as score_module
from trainer.evaluation.options import EvaluateConfig, ScoreConfig
from trainer.evaluation.quality import spaces
from trainer.evaluation.quality.card import Card, differences
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.quality.frechet import Gaussian, frechet_distance, gaussian_of
from trainer.evaluation.quality.record import read_record
from trainer.evaluation.quality.six_spaces import warnings_of_spaces

WIDTH = 5


def test_divisors_are_the_published_ones() -> None:
    """arXiv 2604.28190; the release's scripts/README.md, table of valFD."""
    assert spaces.PUBLISHED == {
        "inception": 1.68, "fdr-convnext": 56.87, "fdr-dinov2": 14.19, "fdr-mae": 0.04, "fdr-siglip": 0.60,
        "fdr-clip": 5.60,
    }  # fmt: skip


def test_it_is_the_mean_of_ratios_and_of_all_six() -> None:
    ratios = {name: spaces.Ratio(fd=2.0 * i, held_out=float(i)) for i, name in enumerate(spaces.PUBLISHED, 1)}
    assert spaces.mean_ratio(ratios) == 2
    ratios["inception"] = spaces.Ratio(fd=14.0, held_out=1.0)
    assert spaces.mean_ratio(ratios) == pytest.approx((14 + 5 * 2) / 6)
    with pytest.raises(UserError, match="mean over six spaces, and fdr-clip are missing"):
        spaces.mean_ratio({name: each for name, each in ratios.items() if name != "fdr-clip"})
    with pytest.raises(UserError, match="at distance 0 in fdr-mae"):
        spaces.mean_ratio(ratios | {"fdr-mae": spaces.Ratio(fd=1.0, held_out=0.0)})


def numbers(name: str, what: str, n: int = 40) -> np.ndarray:
    seed = list(spaces.PUBLISHED).index(name) * 10 + len(what)
    return np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are described by numbers of their name and their space."""

    def describe(self: Description, sets: list[tuple[Path, Path, int]], like: Path | None, **_: bool) -> None:
        for where, out, _limit in sets:
            identity = VectorsIdentity(name=self.encoder, vector="cls", weights_sha256=self.encoder)
            features = numbers(self.encoder, where.stem)
            arrays = {"features": features}
            if self.encoder == "inception":
                identity = replace(identity, vector="pool_3", published_weights=True)
                arrays |= {"spatial": features[:, :2], "logits": features[:, :3]}
            write_feature_file(out, arrays, identity, {"path": str(where), "n": len(features), "digest": str(where)})

    monkeypatch.setattr(Description, "describe", describe)
    monkeypatch.setattr("trainer.evaluation.quality.evaluate.INCEPTION_WIDTH", WIDTH)


@pytest.mark.usefixtures("described")
def test_a_run_is_scored_in_six_spaces_each_of_which_is_described_once(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "micro"
    shutil.copytree(micro_run, run, ignore=shutil.ignore_patterns("samples-*", "evaluations.jsonl", "report.html"))
    statistics(tmp_path / "stats")
    plain, asked, lacking = Description.describe, list[tuple[str, bool]](), ["fdr-siglip"]

    def describe(self: Description, *sets: Any, check: bool = False) -> None:
        asked.append((self.encoder, check))
        if self.encoder in lacking:
            print(f"python -m pipeline features: error: weights of {self.encoder} are not there", file=sys.stderr)
            sys.exit(2)
        if not check:
            plain(self, *sets)

    monkeypatch.setattr(Description, "describe", describe)
    line = [
        "score",
        run,
        "--encoder",
        "fdr6",
        "--reference",
        tmp_path / "stats",
        "--n",
        40,
        "--steps",
        1,
        "--batch",
        40,
    ]
    line += ["--vae", TINY_VAE, "--device", "cpu", "--resamples", 0]

    def score(*more: str) -> tuple[int, str, str]:
        return run_here(main, "python -m trainer", [*line, *more], capsys)

    assert score() == (2, "", "python -m pipeline features: error: weights of fdr-siglip are not there\n")
    assert all(check for _, check in asked)
    status, _, err = score("--weights", "x.pt")
    assert (status, err.count("\n")) == (2, 1)
    assert "six networks; leave --weights out" in err
    status, _, err = score("--held-out", str(tmp_path / "nowhere"))
    assert (status, err.count("\n")) == (2, 1)
    assert "nowhere does not exist" in err
    assert not list(run.glob("samples-*"))

    lacking.clear()
    evaluate_one = score_module.evaluate

    def killed(images: Path, reference: Path, how: Description, **options: Any) -> dict[str, Any]:
        if how.encoder == "fdr-mae":
            raise KeyboardInterrupt
        return evaluate_one(images, reference, how, **options)

    with monkeypatch.context() as patched:
        patched.setattr(score_module, "evaluate", killed)
        assert score()[0] == 130
    before = [name for name, check in asked if not check]
    assert before == ["inception", "fdr-convnext", "fdr-dinov2"]
    lacking += before  # whose weights are needed no more
    asked.clear()
    status, out, err = score()
    assert status == 0, err
    left = ["fdr-mae", "fdr-siglip", "fdr-clip"]
    assert asked == [(name, check) for check in (True, False) for name in left]
    assert "FDr⁶" in out
    assert [line.name for line in read_record(run)] == [*spaces.PUBLISHED, "fdr6"]
    asked.clear()
    status, again, _ = score()
    assert (status, again) == (0, out[out.index("space") :])
    assert asked == []
    assert len(read_record(run)) == 7

    (file,) = run.glob("samples-*-evaluation/fdr6.json")
    result = json.loads(file.read_text())
    del result["card"]["divisors"], result["card"]["divisors_of"]  # as before its card had them
    file.write_text(json.dumps(result))
    assert score()[0] == 0
    assert asked == []
    assert read_record(run)[-1].card.divisors_of == "published"
    other = gaussian_of(numbers("fdr-clip", "another reference", 90))
    np.savez(tmp_path / "stats" / "in256-fdr-clip.npz", mu=other.mean, sigma=other.covariance)
    status, moved, _ = score()
    assert status == 0
    assert asked == [("fdr-clip", True), ("fdr-clip", False)], "the others' references are as they were"
    assert moved != again
    assert [line.name for line in read_record(run)[-2:]] == ["fdr-clip", "fdr6"]


def statistics(folder: Path) -> dict[str, Gaussian]:
    """A folder with a file for each space."""
    folder.mkdir()
    found = {}
    for name in spaces.PUBLISHED:
        found[name] = gaussian_of(numbers(name, "the reference", 90))
        np.savez(folder / f"in256-{name}.npz", mu=found[name].mean, sigma=found[name].covariance)
    return found


@pytest.mark.usefixtures("described")
def test_six_results_and_their_mean_against_statistics_named_for_each_space(tmp_path: Path) -> None:
    np.savez(tmp_path / "drawn.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "held.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    references = statistics(tmp_path / "stats")
    description = Description(encoder="fdr6")
    options = {"out": tmp_path / "out", "resamples": 0}
    result = spaces.evaluate_spaces(tmp_path / "drawn.npz", tmp_path / "stats", description, **options)  # type: ignore[arg-type]
    distances = {n: frechet_distance(gaussian_of(numbers(n, "drawn")), references[n]) for n in spaces.PUBLISHED}
    for name, distance in distances.items():
        assert result["spaces"][name]["fd"] == pytest.approx(distance)
    expected = np.mean([distances[name] / divisor for name, divisor in spaces.PUBLISHED.items()])
    assert result["metrics"]["fdr6"]["value"] == pytest.approx(expected)
    assert json.loads((tmp_path / "out" / "fdr6.json").read_text())["card"]["extractor"] == "fdr6"
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {"fdr6", *spaces.PUBLISHED}
    assert "FDr⁶" in spaces.table(result)
    own = spaces.evaluate_spaces(
        tmp_path / "drawn.npz",
        tmp_path / "stats",
        description,
        held_out=tmp_path / "held.npz",
        **options,  # type: ignore[arg-type]
    )
    divisors = {n: frechet_distance(gaussian_of(numbers(n, "held")), references[n]) for n in spaces.PUBLISHED}
    assert own["metrics"]["fdr6"]["value"] == pytest.approx(np.mean([distances[n] / divisors[n] for n in distances]))
    assert own["encoder"]["held_out"] == str(tmp_path / "held.npz")


@pytest.mark.usefixtures("described")
def test_statistics_are_taken_for_the_extractor_that_their_file_is_named_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "drawn.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    references = statistics(tmp_path / "stats")
    how = Description(encoder="fdr-mae")
    found = evaluate(tmp_path / "drawn.npz", tmp_path / "stats" / "in256-fdr-mae.npz", how, out=tmp_path, resamples=0)
    expected = frechet_distance(gaussian_of(numbers("fdr-mae", "drawn")), references["fdr-mae"])
    assert found["metrics"]["fd"]["value"] == pytest.approx(expected)
    assert found["card"]["n_reference"] == 0
    with pytest.raises(UserError, match=r"fdr-mae needs them, .* whose name ends in -fdr-mae\.npz"):
        evaluate(tmp_path / "drawn.npz", tmp_path / "stats" / "in256-fdr-clip.npz", how, out=tmp_path)
    np.savez(tmp_path / "x-fdr-mae.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="mean of 3 numbers, fdr-mae's features have 5"):
        evaluate(tmp_path / "generated-fdr-mae.npz", tmp_path / "x-fdr-mae.npz", how, out=tmp_path)


def scored(folder: Path, reference: Path, **options: Any) -> dict[str, Any]:
    np.savez(folder / "drawn.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    np.savez(folder / "held.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    out = options.pop("out", folder / "out")
    options = {"resamples": 0, **options}
    return spaces.evaluate_spaces(folder / "drawn.npz", reference, Description(encoder="fdr6"), out=out, **options)


@pytest.mark.usefixtures("described")
def test_the_card_has_divisors_and_references_of_all_six_spaces(tmp_path: Path) -> None:
    references = statistics(tmp_path / "stats")
    result = scored(tmp_path, tmp_path / "stats")
    card = Card(**result["card"])
    one = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["card"] for name in spaces.PUBLISHED}
    assert card.divisors == [
        *("inception 1.68", "fdr-convnext 56.87", "fdr-dinov2 14.19", "fdr-mae 0.04", "fdr-siglip 0.6", "fdr-clip 5.6"),
    ]
    assert card.divisors_of == "published"
    assert card.references_sha256 == [f"{name} {one[name]['reference_sha256']}" for name in spaces.PUBLISHED]
    assert len(set(card.references_sha256)) == 6
    joined = "".join(one[name]["reference_sha256"] for name in spaces.PUBLISHED)
    assert card.reference_sha256 == hashlib.sha256(joined.encode()).hexdigest()
    assert card.reference == str(tmp_path / "stats")
    assert card.extractor_vector == "; ".join(f"{name} {one[name]['extractor_vector']}" for name in spaces.PUBLISHED)
    assert all((one[name]["divisors"], one[name]["divisors_of"]) == ([], "") for name in one)

    own = Card(**scored(tmp_path, tmp_path / "stats", held_out=tmp_path / "held.npz", out=tmp_path / "b")["card"])
    assert {name for name, *_ in differences(card, own)} == {"divisors", "divisors_of"}
    assert own.divisors_of == str(tmp_path / "held.npz")  # which this fixture has for a digest
    held = frechet_distance(gaussian_of(numbers("fdr-clip", "held")), references["fdr-clip"])
    assert own.divisors is not None
    assert own.divisors[-1].split()[0] == "fdr-clip"
    assert float(own.divisors[-1].split()[1]) == pytest.approx(held)

    other = gaussian_of(numbers("fdr-clip", "another reference", 90))
    np.savez(tmp_path / "stats" / "in256-fdr-clip.npz", mu=other.mean, sigma=other.covariance)
    moved = Card(**scored(tmp_path, tmp_path / "stats", out=tmp_path / "c")["card"])
    assert {name for name, *_ in differences(card, moved)} == {"reference_sha256", "references_sha256"}


@pytest.mark.usefixtures("described")
def test_its_departures_are_its_own(tmp_path: Path) -> None:
    statistics(tmp_path / "stats")
    result = scored(tmp_path, tmp_path / "stats", protocol="repa")
    assert "extractor: fdr6, not inception" in result["card"]["departures"]


@pytest.mark.usefixtures("described")
def test_interval_and_line_are_those_of_the_spaces_over_the_divisors(tmp_path: Path) -> None:
    statistics(tmp_path / "stats")
    result = scored(tmp_path, tmp_path / "stats", resamples=50)
    of = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in spaces.PUBLISHED}
    fds = {name: each["metrics"].get("fid") or each["metrics"]["fd"] for name, each in of.items()}
    metric = result["metrics"]["fdr6"]
    for end in (0, 1):
        expected = np.mean([fds[name]["interval"][end] / divisor for name, divisor in spaces.PUBLISHED.items()])
        assert metric["interval"][end] == pytest.approx(expected)
    assert metric["interval"][0] < metric["value"] < metric["interval"][1]
    assert metric["deviation"] == pytest.approx(
        np.mean([fds[name]["deviation"] / divisor for name, divisor in spaces.PUBLISHED.items()])
    )
    assert (metric["resampled"], metric["resamples"]) == ("generated", 50)
    lines = {name: each["bias"].get("fid") or each["bias"]["fd"] for name, each in of.items()}
    bias = result["bias"]["fdr6"]
    assert bias["sizes"] == [40, 20, 10]
    assert bias["values"][0] == pytest.approx(metric["value"])
    assert bias["infinity"] == pytest.approx(
        np.mean([lines[name]["infinity"] / divisor for name, divisor in spaces.PUBLISHED.items()])
    )
    shown = spaces.table(result)
    assert f"FDr⁶ is {metric['interval'][0]:.4f} to {metric['interval'][1]:.4f}" in shown
    assert f"FDr⁶_inf is {bias['infinity']:.4f}" in shown
    without = scored(tmp_path, tmp_path / "stats", out=tmp_path / "b")
    assert "interval" not in without["metrics"]["fdr6"]
    assert without["bias"] == {}


@pytest.mark.usefixtures("described")
def test_published_divisors_of_another_reference_are_warned_of(tmp_path: Path) -> None:
    statistics(tmp_path / "stats")

    def warned(result: dict[str, Any]) -> list[str]:
        return [text for text in result["warnings"] if "published distances" in text]

    assert warned(scored(tmp_path, tmp_path / "stats")) == []
    (tmp_path / "stats" / "in256-fdr-mae.npz").rename(tmp_path / "stats" / "cars-fdr-mae.npz")
    (text,) = warned(scored(tmp_path, tmp_path / "stats"))
    assert "cars-fdr-mae.npz is that (in fdr-mae). Measure the divisors with --held-out IMAGES" in text
    np.savez(tmp_path / "imagenet.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    result = scored(tmp_path, tmp_path / "imagenet.npz")  # some images of it
    (text,) = warned(result)
    assert text.count("fdr-") == 5
    assert text in spaces.table(result)
    assert warned(scored(tmp_path, tmp_path / "imagenet.npz", held_out=tmp_path / "held.npz")) == []


@pytest.mark.parametrize(
    ("reference", "is_it"),
    [
        ({"kind": "statistics", "path": "/x/VIRTUAL_imagenet256_labeled.npz"}, True),
        ({"kind": "statistics", "path": "/x/in256-fdr-clip.npz"}, True),
        ({"kind": "statistics", "path": "/x/imagenet-fdr-clip.npz"}, True),
        ({"kind": "statistics", "path": "/x/VIRTUAL_imagenet512.npz"}, False),
        ({"kind": "statistics", "path": "/x/in256-val-clip.npz"}, False),
        ({"kind": "statistics", "path": "/x/imagenet256_val.npz"}, False),
        ({"kind": "statistics", "path": "/x/imagenet-a-fdr-clip.npz"}, False),
        ({"kind": "statistics", "path": "/x/imagenet_v2.npz"}, False),
        ({"kind": "statistics", "path": "/imagenet/train256-fdr-clip.npz"}, False),
        ({"kind": "statistics", "path": "/x/imagenette-fdr-clip.npz"}, False),
        ({"kind": "statistics", "path": "/x/tiny-imagenet-fdr-clip.npz"}, False),
        ({"kind": "store", "path": "/x", "n": 1_281_160, "n_failed": 7, "size": [256, 256]}, True),
        ({"kind": "store", "path": "/x", "n": 1_281_167, "size": [512, 512]}, False),
        ({"kind": "store", "path": "/imagenet256", "n": 10_000, "size": [256, 256]}, False),
    ],
)
def test_what_says_that_it_is_imagenet(reference: dict[str, Any], is_it: bool) -> None:
    results = {"inception": {"warnings": [], "reference": reference}}
    assert bool(warnings_of_spaces(results, "published")) != is_it


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="six networks; leave --weights out"):
        spaces.evaluate_spaces(tmp_path, tmp_path, Description(encoder="fdr6", weights=tmp_path))
    with pytest.raises(UserError, match="--held-out goes with --encoder fdr6, not inception"):
        EvaluateConfig(images=tmp_path, reference=tmp_path, held_out=tmp_path)
    with pytest.raises(UserError, match="--held-out goes with --encoder fdr6, not inception"):
        ScoreConfig(run=tmp_path, held_out=tmp_path)
    assert len(FDR6) == 5
