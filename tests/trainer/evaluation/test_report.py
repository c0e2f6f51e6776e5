"""The report: what is in it. `test_report_in_browser.py` has what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import open_store
from storage.base.errors import UserError
from tests.stores import FEATURES
from tests.trainer.evaluation.report_runs import (
    BATCH,
    RATE,
    STEPS,
    draw,
    evaluate,
    make_run,
    parsed,
    plain,
    structure,
)
from trainer.evaluation.report import pictures
from trainer.evaluation.report.alike import evaluated, measured_alike
from trainer.evaluation.report.measures import span
from trainer.evaluation.report.methods import differing, methods_of
from trainer.evaluation.report.page import named_shortly, page, write_report
from trainer.evaluation.report.results import runs_table
from trainer.evaluation.report.run_record import read_runs
from trainer.evaluation.report.settings import in_words


def test_the_page_is_whole_and_refers_to_nothing(report: Path) -> None:
    found = parsed(report)
    assert len(found.references) == 2, "a picture of each method"
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in found.references)
    assert "A study with <angle brackets> & more" in found.text
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"<!--\w+-->", text)
    assert not re.search(r"(https?:)?//[\w.]+\.\w", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    assert "@import" not in text
    assert "url(" not in text


def test_what_a_reader_asks_first_is_first(study: Path) -> None:
    text = page(read_runs([study]), "x", real=False)
    order = ('<p class="verdict', "<h2>Samples", "<h2>Curves", "<h2>Numbers", "<h2>Settings", "<h2>How images were",
             "<h2>Origin")  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_only_differences_of_settings_are_listed_apart(runs: Path, report: Path) -> None:
    assert differing(read_runs([runs])) == ["seed", "loss.projection_weight"]
    text = plain(report.read_text(encoding="utf-8"))
    for name in ("FID", "Linear probe", "CKNNA", "Denoising loss"):
        assert f'<button type="button">{name}</button>' in text
    assert "sFID" not in text
    assert "<dt>optim.lr</dt><dd>0.002</dd>" in text
    assert "<dt>loss.projection_weight</dt>" not in text


def test_numbers(runs: Path, shared_tiny_store: Path) -> None:
    records = {record.name: record for record in read_runs([runs])}
    one = records["run-1"]
    assert one.hours == pytest.approx(STEPS * BATCH / RATE * 2 / 3600)  # two ranks
    assert one.images_per_s == RATE
    (group,) = measured_alike(list(records.values()), "cknna")
    assert sorted(group.values) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert round(group.values[1][-1].value("cknna") or 0, 2) == 0.41
    shown = plain(page(list(records.values()), "numbers"))
    assert "<small>block 4, t = 0.5 with tiny-vit</small>" in shown
    assert "<small>block 4, t = 0.5</small>" in shown, "a probe compares with no features"
    digest = open_store(shared_tiny_store).group(FEATURES).identity_digest
    assert f">{digest[:12]}<" in shown


def test_what_a_run_has_spent_at_any_step(runs: Path) -> None:
    record = next(record for record in read_runs([runs]) if record.name == "run-1")
    for step in (0, 5, 10, 14, 300):
        spent = record.spent_at(step)
        assert (spent.step if step in (0, 10, 300) else step) == step
        assert spent.images == pytest.approx(step * BATCH)
        assert spent.seconds == pytest.approx(step * BATCH / RATE)
        assert spent.device_seconds == pytest.approx(2 * spent.seconds)
    assert record.spent_at(600).images == 600 * BATCH
    assert record.spent_at(600).seconds == record.spent_at(300).seconds, "nothing says how fast it went on"
    assert dataclasses.replace(record, lines=[]).hours is None


def test_origin_is_said_and_what_is_not_known_is_too(runs: Path, shared_tiny_store: Path, tmp_path: Path) -> None:
    text = plain(page(read_runs([runs / "run-1"]), "x"))
    for word in ("1,234,567", "9.8.7", "c0ffeec0ffee", "a-machine", "2 processes on CPUs"):
        assert word in text
    assert "GPU-hours" not in text
    assert "unknown" not in text.partition("<h2>Origin")[2].partition("<h3>Stores")[0]
    old = make_run(tmp_path, shared_tiny_store, 1, 0.5, measured=False)
    (old / "summary.json").write_text("{}")
    assert "unknown" in page(read_runs([old]), "x").partition("<h2>Origin")[2]
    on_gpus = make_run(tmp_path, shared_tiny_store, 2, 0.5, measured=False, device="NVIDIA H100")
    text = plain(page(read_runs([on_gpus]), "x"))
    assert "0.0133 GPU-hours" in text  # 300 steps of 8 images at 100 images/s on 2 GPUs
    assert ">GPU-hours</button>" in text, "an axis"
    assert [in_words(s) for s in (0.4, 69, 95, 745, 11_000, 216_000)] == ["0 s", "69 s", "1.6 min", "12.4 min", "3.1 h",
                                                                         "2.5 d"]  # fmt: skip


def test_long_names_give_way_to_what_tells_runs_apart(runs: Path) -> None:
    records = read_runs([runs / "run-0", runs / "run-3"])
    assert [run.name for run in named_shortly(records)] == ["run-0", "run-3"]
    long = [dataclasses.replace(run, name=f"{run.name}-with-a-name-of-an-ablation") for run in records]
    assert [run.name for run in named_shortly(long)] == ["0 · 0.5", "3 · 0.0"]


def test_a_store_that_is_gone_is_said_so(runs: Path, shared_tiny_store: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, shared_tiny_store, 1, 0.5, measured=False)
    draw(run)
    config = (run / "config.yaml").read_text().replace(str(shared_tiny_store), "/gone")
    (run / "config.yaml").write_text(config)
    text = page(read_runs([run]), "gone")
    assert "not there now" in text
    assert "class 4" in text, "a class without its name is a number"


def test_what_is_no_run_is_refused(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(UserError, match="is not a run and holds none"):
        write_report([tmp_path], tmp_path / "report.html", "")
    assert len(read_runs([runs, runs / "run-1"])) == 10


def test_runs_are_found_where_an_ablation_puts_them(shared_tiny_store: Path, tmp_path: Path) -> None:
    """`make report RUNS="runs/*"` beside `make ablate`, whose runs are runs/ablations/STUDY/NAME."""
    for folder, seed in (("one", 1), ("ablations/study", 1), ("ablations/study", 2)):
        make_run(tmp_path / folder, shared_tiny_store, seed, 0.5, measured=False)
    records = read_runs([tmp_path / "one" / "run-1", tmp_path / "ablations"])
    assert [record.name for record in records] == ["one/run-1", "study/run-1", "run-2"]
    (out,) = write_report([tmp_path / "one", tmp_path / "ablations"], tmp_path / "page.html", "")
    assert "<h1>Runs in one, study</h1>" in out.read_text()


# ---- samples, cards ---------------------------------------------------------------------------------------------


def strips(text: str) -> list[tuple[str, list[str]]]:
    """(heading, captions) of every row of images."""
    rows = plain(text).split('<section class="strip-row">')[1:]
    captions = [re.findall(r"<figcaption>(.*?)</figcaption>", row.partition("</section>")[0]) for row in rows]
    return [(re.findall(r"<h3>(.*?)<small>", row)[0], of) for row, of in zip(rows, captions, strict=True)]


def test_the_same_images_of_every_method_stand_below_each_other_with_their_classes(study: Path) -> None:
    text = page(read_runs([study]), "x", real=False)
    shown = strips(text)
    assert len(shown) == 3
    assert {tuple(captions) for _, captions in shown} == {("class0", "class1", "class2", "class3", "class4", "class0",
                                                           "class1", "class2")}  # fmt: skip
    assert "The same place has the same noise and class in every run" in text
    assert "One run of each method is shown; 2 of other seeds are not." in text
    assert text.count('class="all"') == 3


def test_sets_drawn_otherwise_are_said_to_be(shared_tiny_store: Path, tmp_path: Path) -> None:
    for seed, settings in ((1, {}), (2, {}), (3, {"seed": 5})):
        draw(make_run(tmp_path, shared_tiny_store, seed, 0.5, measured=False), **settings)
    text = page(read_runs([tmp_path]), "x", real=False)
    assert "places need not have the same noise and class" in text
    assert "ode in 50 steps, guidance 1.5, noise of seed 5" in text


def test_images_are_chosen_over_the_classes() -> None:
    assert pictures.spread_over(None, 100, 3) == [0, 1, 2]
    assert pictures.spread_over([7, 7, 7, 2, 7, 9, 2], 7, 4) == [0, 1, 3, 5]
    assert pictures.spread_over([1, 2], 2, 8) == [0, 1]


def test_real_images_that_cannot_be_had_are_said_so(shared_tiny_store: Path, tmp_path: Path) -> None:
    """The store of the tests was made of random numbers."""
    draw(make_run(tmp_path, shared_tiny_store, 1, 0.5, measured=False))
    text = page(read_runs([tmp_path]), "x")
    assert strips(text)[0][0] == "Real images"
    assert "was not made of images, but imported" in text


def test_a_page_of_many_large_pictures_stays_small() -> None:
    rng = np.random.default_rng(0)
    noise = {str(i): rng.integers(0, 256, (512, 512, 3), dtype=np.uint8) for i in range(24)}
    uris = pictures.encoded(noise, dict.fromkeys(noise, 512))
    assert 0 < sum(map(len, uris.values())) < 4 / 3 * pictures.PAGE_BYTES + 100 * len(noise)
    assert len(pictures.encoded({"0": noise["0"]}, {"0": 512})["0"]) > len(uris["0"])


def test_a_card_is_shown_with_all_its_fields(study: Path) -> None:
    records = read_runs([study])
    text = plain(page(records, "x", real=False)).partition("<h2>How images were measured")[2].partition("<h2>")[0]
    for word in ("labels", "random", "balanced", "calls", "250", "decoder", "unknown", "rounding", "0.7", "none"):
        assert word in text
    assert "repa-seed0, repa-seed1, vanilla-seed0, vanilla-seed1" in text, "like cards share a column"
    ways = [evaluated(record.evaluations[-1], "fid") for record in records]
    assert {way.apart(ways[1]) for way in ways} == {"", "labels random, not balanced"}
    assert ways[1].apart(ways[2]) == ""


def test_a_record_without_a_card_says_what_it_knows(runs: Path) -> None:
    text = plain(page(read_runs([runs / "run-1"]), "x")).partition("<h2>How images were measured")[2]
    for word in ("/reference", "512", "1,152", "inception", ">unknown<"):
        assert word in text.partition("<h2>")[0]


def test_intervals_are_shown_beside_the_values(study: Path, shared_tiny_store: Path, tmp_path: Path) -> None:
    records = read_runs([study])
    assert "<small>95% 11.90 to 12.80</small>" in plain(runs_table(records, methods_of(records)))
    assert "says nothing of another seed's training. All are of 512 images." in plain(page(records, "x", real=False))
    for seed, n in ((1, 64), (2, 32)):
        run = make_run(tmp_path, shared_tiny_store, seed, 0.5, measured=False)
        evaluate(run, 1.0, metrics={"fid": {"value": 3.0, "n_generated": n, "interval": [2.0, 4.0]}})
    records = read_runs([tmp_path])
    assert "<small>95% 2.00 to 4.00; 64 images</small>" in plain(runs_table(records, methods_of(records)))


def test_a_small_value_has_the_digits_of_its_interval(shared_tiny_store: Path, tmp_path: Path) -> None:
    """Not `0.003` above an interval of 0.00314 to 0.00341."""
    run = make_run(tmp_path, shared_tiny_store, 0, 0.5, measured=False)
    evaluate(run, 1.0, metrics={"kid": {"value": 0.003271, "n_generated": 2000, "interval": [0.003142, 0.003412]}})
    (page,) = write_report([run], tmp_path / "report.html", "")
    text = plain(page.read_text())
    assert "0.00327" in text
    assert "95% 0.00314 to 0.00341" in text
    assert not re.search(r"0\.003(?!\d)", text)


@given(low=st.floats(-1e7, 1e7), width=st.floats(0, 1e7))
def test_both_ends_of_an_interval_have_the_same_digits(low: float, width: float) -> None:
    one, other = span(low, low + width).split(" to ")
    assert float(one) <= float(other)
    for text, value in ((one, low), (other, low + width)):
        assert float(text) == pytest.approx(value, rel=0.01, abs=1e-5)
    plain = [text for text in (one, other) if "e" not in text and float(text)]
    if len(plain) == 2 and "e" not in one + other:
        assert len({len(text.partition(".")[2]) for text in plain}) == 1


def test_pictures_of_the_store_have_captions_in_words(study: Path, runs: Path) -> None:
    text = page(read_runs([study]), "x", beside=study, real=False)
    assert "Images, and their stored patch tokens: the first three principal components as colours" in text
    assert "What the stores hold" not in page(read_runs([runs]), "x")


def test_structure_refuses_what_is_not_closed() -> None:
    with pytest.raises(AssertionError):
        structure("<div><p></div>")
