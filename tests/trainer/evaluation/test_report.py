"""The report: what is in it, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import open_store
from storage.base.errors import UserError
from tests.chromium import BINARY, Browser
from tests.stores import FEATURES
from tests.trainer.evaluation.report_runs import (
    BATCH,
    RATE,
    STEPS,
    draw,
    evaluate,
    evaluation,
    make_run,
    parsed,
    plain,
    structure,
)
from trainer.evaluation.generate.decode import write_grid
from trainer.evaluation.report import pictures
from trainer.evaluation.report.alike import measured_alike
from trainer.evaluation.report.cards import unlike
from trainer.evaluation.report.methods import differing, methods_of
from trainer.evaluation.report.page import named_shortly, page, write_report
from trainer.evaluation.report.results import runs_table
from trainer.evaluation.report.run_record import read_runs
from trainer.evaluation.report.settings import in_words

WIDTHS = (390, 1280, 1920)
CARD = {
    "run": "r",
    "labels": "balanced",
    "sampler": "euler-maruyama",
    "calls": 250,
    "guidance_high": 0.7,
    "rounding": "round",
    "n_images": 512,
    "departures": [],
}


@pytest.fixture(scope="module")
def runs(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten runs, of which one has no alignment and one was not measured."""
    folder = tmp_path_factory.mktemp("study")
    for seed in range(10):
        make_run(folder, shared_tiny_store, seed, 0.0 if seed == 3 else 0.5, measured=seed != 4)
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    """The page."""
    (out,) = write_report([runs], runs / "report.html", "A study with <angle brackets> & more")
    return out


@pytest.fixture(scope="module")
def study(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs that differ in much: two methods of two seeds, and a mixed one with a very long name and path."""
    folder = tmp_path_factory.mktemp("mixed-study")
    for weight, name in ((0.5, "repa"), (0.0, "vanilla")):
        for seed in (0, 1):
            run = make_run(folder, shared_tiny_store, seed, weight, measured=True, name=f"{name}-seed{seed}")
            fid = {"value": 20.0 + seed / 10 + 9 * (not weight), "n_generated": 512, "n_reference": 1152}
            (run / "evaluations.jsonl").write_text(json.dumps(evaluation(0, metrics={"fid": fid}, card=CARD)) + "\n")
            draw(run)
    long = "irepa-with-" + "a-very-long-name-" * 5 + "and_unbreakablewordsthatgoonandon"
    mixed = make_run(folder, shared_tiny_store, 7, 0.25, measured=True, name=long)
    names = ("fid", "sfid", "fd", "kid", "cmmd", "inception_score", "precision", "recall", "density", "coverage")
    metrics = {n: {"value": 12.345, "n_generated": 512, "n_reference": 1152, "interval": [11.9, 12.8]} for n in names}
    evaluate(mixed, 1.0, metrics=metrics, card={**CARD, "labels": "random", "reference": "/a/long/" + "path" * 30})
    text = (mixed / "config.yaml").read_text()
    for name, value in (("lr", "0.0003"), ("batch", "16"), ("depth", "5"), ("heads", "2"), ("label_dropout", "0.25")):
        text = re.sub(rf"(?m)^(\s*{name}: ).*$", rf"\g<1>{value}", text)
    (mixed / "config.yaml").write_text(text)
    draw(mixed)
    write_grid(np.full((16, 64, 64, 3), 99, dtype=np.uint8), folder / "features.png", columns=8)
    return folder


def test_the_page_is_whole_and_refers_to_nothing(report: Path) -> None:
    found = parsed(report)
    assert len(found.references) == 10
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in found.references)
    assert "A study with <angle brackets> & more" in found.text
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"<!--\w+-->", text)
    assert not re.search(r"(https?:)?//[\w.]+\.\w", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    assert "@import" not in text
    assert "url(" not in text


def test_what_a_reader_asks_first_is_first(study: Path) -> None:
    text = page(read_runs([study]), "x", real=False)
    order = ('<p class="verdict', "<h2>Samples", "<h2>Curves", "<h2>Numbers", "<h2>How images were", "<h2>Settings",
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


def test_the_same_images_of_every_run_stand_below_each_other_with_their_classes(study: Path) -> None:
    text = page(read_runs([study]), "x", real=False)
    shown = strips(text)
    assert len(shown) == 5
    assert {tuple(captions) for _, captions in shown} == {("class0", "class1", "class2", "class3", "class4", "class0",
                                                           "class1", "class2")}  # fmt: skip
    assert "The same column has the same noise and class in every run" in text
    assert text.count('class="all"') == 5


def test_sets_drawn_otherwise_are_said_to_be(shared_tiny_store: Path, tmp_path: Path) -> None:
    for seed, settings in ((1, {}), (2, {}), (3, {"seed": 5})):
        draw(make_run(tmp_path, shared_tiny_store, seed, 0.5, measured=False), **settings)
    text = page(read_runs([tmp_path]), "x", real=False)
    assert "columns need not have the same noise and class" in text
    assert "ode in 50 steps, guidance 1.5, seed 5" in text


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
    lines = [record.evaluations[-1] for record in records]
    assert sorted(unlike(lines)) == ["labels"]
    assert unlike(lines[1:3]) == {}


def test_a_record_without_a_card_says_what_it_knows(runs: Path) -> None:
    text = plain(page(read_runs([runs / "run-1"]), "x")).partition("<h2>How images were measured")[2]
    for word in ("/reference", "512", "1,152", "inception", ">unknown<"):
        assert word in text.partition("<h2>")[0]


def test_intervals_are_shown_beside_the_values(study: Path) -> None:
    records = read_runs([study])
    assert "<small>11.90 to 12.80; 512 images</small>" in plain(runs_table(records, methods_of(records)))


def test_pictures_of_the_store_have_captions_in_words(study: Path, runs: Path) -> None:
    text = page(read_runs([study]), "x", beside=study, real=False)
    assert "Images, and their stored patch tokens: the first three principal components as colours" in text
    assert "What the stores hold" not in page(read_runs([runs]), "x")


# ---- in a browser -----------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium here (apt-get install chromium)")


@needs_browser
def test_in_a_browser(report: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(report, 1280)
        assert browser.run(
            "[...document.querySelectorAll('main img')].every(image => image.complete && image.naturalWidth > 0)"
        )
        click(browser, "[...document.querySelectorAll('.controls button')].find(b => b.dataset.value === 'logged')")
        shown = "[...document.querySelectorAll('.chart .look:not([hidden]) .line')]"
        assert browser.run(f"{shown}.map(path => path.getBBox().width > 100)") == [True] * (10 + 9 + 9 + 9)

        table = "[...document.querySelectorAll('table.sortable')].find(t => t.tBodies[0].rows.length === 10)"
        names = f"[...{table}.tBodies[0].rows].map(row => row.cells[0].innerText)"
        head = f"[...{table}.querySelectorAll('thead th')].find(th => th.innerText.startsWith('FID'))"
        by_fid = [f"run-{seed}" for seed in (9, 8, 7, 6, 5, 3, 2, 1, 0)]
        for order, expected in (("ascending", by_fid), ("descending", by_fid[::-1])):
            click(browser, f"{head}.querySelector('button')")
            assert browser.run(f"{head}.ariaSort") == order
            assert browser.run(names) == [*expected, "run-4"], "what was not measured is last either way"
        assert (
            browser.run(f"[...{table}.querySelectorAll('thead th')].filter(th => th.ariaSort !== 'none').length") == 1
        )

        browser.run("document.querySelector('.chart').scrollIntoView({block: 'center'})")
        box = bounds(browser, "document.querySelector('.chart .look:not([hidden]) svg')")
        browser.mouse("mouseMoved", box["x"] + box["width"] * 0.96, box["y"] + box["height"] / 2)
        tip = browser.run("document.querySelector('.tip').innerText")
        assert "step 300" in tip
        assert re.search(r"run-0\s+0\.24\b", tip)
        click(browser, "[...document.querySelectorAll('.controls button')].find(b => b.dataset.value === 'images')")
        assert "images seen" in browser.run("document.querySelector('.chart .look:not([hidden]) svg').textContent")
        browser.open(report, WIDTHS[0], scheme="dark")
        assert browser.requests
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data"}
        assert not browser.errors


@needs_browser
def test_no_table_is_wider_than_the_page(study: Path, tmp_path: Path) -> None:
    """Five mixed runs with many measures and long names, on a phone, a laptop and a wide screen."""
    (out,) = write_report([study], tmp_path / "page.html", "")
    wider = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.getClientRects().length &&"
        "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
        ".map(e => e.tagName + e.className + e.textContent)"
    )
    scrolls = "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
    scrolls += "['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)).length"
    spills = (
        "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.parentElement.clientWidth + 1).length"
    )
    with Browser(tmp_path / "profile") as browser:
        for width in WIDTHS:
            browser.open(out, width)
            assert browser.run("innerWidth") == width
            assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert browser.run(wider) == []
            assert browser.run(scrolls) == 0
            assert browser.run(spills) == 0
        names = "[...document.querySelectorAll('thead th, tbody th, .strip-row h3')]"
        held = f"{names}.filter(e => e.getClientRects().length).every(e => getComputedStyle(e).position !== 'static')"
        browser.open(out, WIDTHS[0])
        assert browser.run(held), "names stay in view"


@needs_browser
def test_the_answer_is_on_the_first_screen_and_readable_light_and_dark(study: Path, tmp_path: Path) -> None:
    (out,) = write_report([study], tmp_path / "page.html", "")
    with Browser(tmp_path / "profile") as browser:
        for scheme in ("light", "dark"):
            for width in WIDTHS:
                browser.open(out, width, height=844, scheme=scheme)
                box = bounds(browser, "document.querySelector('.verdict')")
                assert box["y"] + box["height"] < 500
                if width > 390:
                    assert bounds(browser, "document.querySelector('.tablebox')")["bottom"] < 844
            for text, ground in (
                ("--ink", "--ground"),
                ("--soft", "--ground"),
                ("--soft", "--card"),
                ("--ink", "--card"),
            ):
                assert contrast(browser, text, ground) >= 4.5
            for colour in range(8):
                assert contrast(browser, f"--c{colour}", "--card") >= 3


@needs_browser
def test_a_click_shows_an_image_large_and_arrows_go_to_the_same_of_the_next_run(study: Path, tmp_path: Path) -> None:
    (out,) = write_report([study], tmp_path / "page.html", "")
    with Browser(tmp_path / "profile") as browser:
        browser.open(out, 1280)
        strip = "[...document.querySelectorAll('.strip-row')].find(row => row.innerText.startsWith('repa-seed0'))"
        click(browser, f"{strip}.querySelectorAll('.sample button')[2]")
        assert browser.run("document.querySelector('dialog').open")
        assert browser.run("document.querySelector('dialog p').innerText") == "repa-seed0: class2"
        press = "document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
        browser.run(f"void {press}")
        assert browser.run("document.querySelector('dialog p').innerText") == "repa-seed1: class2"
        browser.run("document.querySelector('dialog').close()")
        click(browser, f"{strip}.querySelector('.all')")
        assert browser.run("document.querySelector('dialog img').naturalWidth") > 64
        assert not browser.errors


def click(browser: Browser, element: str) -> None:
    browser.run(f"void {element}.scrollIntoView({{block: 'center'}})")
    box = bounds(browser, element)
    browser.mouse("click", box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def bounds(browser: Browser, element: str) -> dict[str, Any]:
    found: dict[str, Any] = browser.run(f"JSON.parse(JSON.stringify({element}.getBoundingClientRect()))")
    return found


def contrast(browser: Browser, text: str, ground: str) -> float:
    """Of two colours of the page's (WCAG 2, relative luminance)."""

    def luminance(name: str) -> float:
        value = browser.run(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
        channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(text), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def test_structure_refuses_what_is_not_closed() -> None:
    with pytest.raises(AssertionError):
        structure("<div><p></div>")
