"""The report: what is in it, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import open_store
from storage.base.errors import UserError
from tests.chromium import BINARY, Browser
from tests.stores import FEATURES, LATENTS
from trainer.config.command_line import train_config
from trainer.config.saved import to_yaml
from trainer.evaluation.generate.decode import write_grid
from trainer.evaluation.report.alike import measured_alike
from trainer.evaluation.report.charts import MOST_POINTS, Line, short, thinned, ticks
from trainer.evaluation.report.page import differing, named_shortly, page, write_report
from trainer.evaluation.report.run_record import read_runs
from trainer.run.checkpoint import VERSION

STEPS, EVERY, BATCH, RATE = 300, 10, 8, 100.0
WIDTHS = (390, 1280)


def make_run(folder: Path, store: Path, seed: int, weight: float, *, measured: bool) -> Path:
    """What a run of 300 steps leaves behind, without its weights."""
    run = folder / f"run-{seed}"
    options = {"preset": "sit-tiny-2", "store": str(store), "run": str(run), "seed": str(seed), "steps": str(STEPS)}
    config = train_config({**options, "batch": str(BATCH), "loss.projection_weight": str(weight)})
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    lines = [
        {
            "step": step,
            "denoising_loss": 1 / (1 + step / 100) + 0.01 * seed,
            "alignment_loss": -0.5 * step / STEPS if weight else 0.0,
            "images_per_s": RATE,
            "ranks": 2,
        }
        for step in range(EVERY, STEPS + 1, EVERY)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps({"device": "cpu"}))
    opened = open_store(store)
    identities = {path: opened.group(path).identity_digest for path in (LATENTS, FEATURES)}
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    checkpoint.mkdir(parents=True)
    state: dict[str, Any] = {"version": VERSION, "step": STEPS, "config": {}, "identities": identities}
    state |= {"log_sums": [], "log_count": 0, "skipped": 0, "scaler": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (run / "latest").write_text(checkpoint.name)
    write_grid(np.full((8, 64, 64, 3), 25 * seed, dtype=np.uint8), run / f"samples-{STEPS:07d}-ode50.png")
    if measured:
        (run / "analysis").mkdir()
        for measure in ("probe", "cknna"):
            points = [{"step": STEPS, "t": 0.5, "block": b, measure: 0.1 * b + 0.01 * seed} for b in (1, 2, 3, 4)]
            (run / "analysis" / f"{measure}.json").write_text(json.dumps({"points": points, **protocol(measure)}))
        (run / "evaluations.jsonl").write_text(json.dumps(evaluation(30.0 - seed)) + "\n")
    return run


def protocol(measure: str, **changes: Any) -> dict[str, Any]:
    """How all are measured, as `sweep` records it."""
    features = {"path": FEATURES, "identity_digest": "f" * 64}
    fields = {"n": 1000, "k": 10, "c": 1.0, "seed": 0, "weights": "ema", "rows": "a" * 64, "depth": 4}
    return {"by": measure, "features": features, "store": "/stores/s", **fields, **changes}


def evaluation(value: float, **changes: Any) -> dict[str, Any]:
    """A line of a run's record."""
    counts = {"n_generated": 512, "n_reference": 1152}
    line = {"step": STEPS, "name": "inception", "encoder": {"name": "inception", "weights_sha256": "1"}}
    line |= {"generated": {"kind": "folder", "path": "/samples", "resolution": 0, "n": 512, "n_failed": 0}}
    line |= {"reference": {"kind": "folder", "path": "/reference", "digest": "d" * 64, "n": 1152, "n_failed": 0}}
    return {**line, "metrics": {"fid": {"value": value, **counts}}, **changes}


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


class Structure(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to and says."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "img", "line", "circle", "path", "wbr", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(report: Path) -> Structure:
    found = Structure()
    found.feed(report.read_text(encoding="utf-8"))
    assert not found.open
    return found


def test_the_page_is_whole_and_refers_to_nothing(report: Path) -> None:
    found = parsed(report)
    assert len(found.references) == 10
    assert all(reference.startswith("data:image/png;base64,") for reference in found.references)
    assert "A study with <angle brackets> & more" in found.text
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"<!--\w+-->", text)
    assert not re.search(r"https?://", text)


def test_only_differences_of_settings_are_columns(runs: Path, report: Path) -> None:
    assert differing(read_runs([runs])) == ["seed", "loss.projection_weight"]
    text = report.read_text(encoding="utf-8")
    for name in ("seed", "loss.<wbr>projection_<wbr>weight", "FID", "Linear probe", "CKNNA", "GPU-hours"):
        assert f'<button type="button">{name}</button>' in text
    assert "sFID" not in text
    assert "<dt>optim.lr</dt><dd>0.002</dd>" in text


def test_numbers(runs: Path, shared_tiny_store: Path) -> None:
    records = {record.name: record for record in read_runs([runs])}
    one = records["run-1"]
    assert one.hours == pytest.approx(STEPS * BATCH / RATE * 2 / 3600)  # two ranks
    assert one.images_per_s == RATE
    (group,) = measured_alike(list(records.values()), "cknna")
    assert sorted(group.values) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert round(group.values[1][-1].value("cknna") or 0, 2) == 0.41
    shown = page(list(records.values()), "numbers")
    assert "<small>block 4, t = 0.5 with tiny-vit</small>" in shown
    assert "<small>block 4, t = 0.5</small>" in shown, "a probe compares with no features"
    digest = open_store(shared_tiny_store).group(FEATURES).identity_digest
    assert f">{digest[:12]}<" in shown


def test_long_names_give_way_to_what_tells_runs_apart(runs: Path) -> None:
    records = read_runs([runs / "run-0", runs / "run-3"])
    assert [run.name for run in named_shortly(records)] == ["run-0", "run-3"]
    long = [dataclasses.replace(run, name=f"{run.name}-with-a-name-of-an-ablation") for run in records]
    assert [run.name for run in named_shortly(long)] == ["0 · 0.5", "3 · 0.0"]


def test_a_store_that_is_gone_is_said_so(runs: Path, shared_tiny_store: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, shared_tiny_store, 1, 0.5, measured=False)
    config = (run / "config.yaml").read_text().replace(str(shared_tiny_store), "/gone")
    (run / "config.yaml").write_text(config)
    assert "not there now" in page(read_runs([run]), "gone")


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


def test_charts() -> None:
    assert ticks(0, 300) == [0, 100, 200, 300]
    assert ticks(0.113, 0.291) == pytest.approx([0.15, 0.2, 0.25])
    assert ticks(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert [short(v) for v in (0, 0.30000000000000004, 250, 400_000)] == ["0", "0.3", "250", "400K"]
    line = Line(label="a", number=0, x=range(1, 1001), y=[1.0] * 500 + [3.0] * 500)
    few = thinned(line)
    assert len(few.x) == len(few.y) <= MOST_POINTS
    assert few.x[-1] == 1000
    assert (few.y[0], few.y[-1]) == (1, 3)


@pytest.mark.skipif(BINARY is None, reason="no Chromium here (apt-get install chromium); .ci/run has one")
def test_in_a_browser(report: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        for width in WIDTHS:
            browser.open(report, width)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("innerWidth") == width
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        drawn = "[...document.querySelectorAll('.chart .line')].map(path => path.getBBox().width > 100)"
        assert browser.run(drawn) == [True] * (10 + 9 + 9 + 9)  # one run has no alignment, one was not measured

        column = "[...document.querySelectorAll('table.sortable')[0].querySelectorAll('thead th')]"
        names = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(row => row.cells[0].innerText)"
        head = f"{column}.find(th => th.innerText.startsWith('FID'))"
        by_fid = [f"run-{seed}" for seed in (9, 8, 7, 6, 5, 3, 2, 1, 0)]
        for order, expected in (("ascending", by_fid), ("descending", by_fid[::-1])):
            browser.run(f"{head}.scrollIntoView({{inline: 'center', block: 'center'}})")
            box = browser.run(f"JSON.parse(JSON.stringify({head}.querySelector('button').getBoundingClientRect()))")
            browser.mouse("click", box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert browser.run(f"{head}.ariaSort") == order
            assert browser.run(names) == [*expected, "run-4"], "what was not measured is last either way"
        assert browser.run(f"{column}.filter(th => th.ariaSort !== 'none').length") == 1

        browser.run("document.querySelector('.chart').scrollIntoView({block: 'center'})")
        box = browser.run("JSON.parse(JSON.stringify(document.querySelector('.chart svg').getBoundingClientRect()))")
        browser.mouse("mouseMoved", box["x"] + box["width"] * 0.99, box["y"] + box["height"] / 2)
        shown = browser.run("document.querySelector('.tip').innerText")
        assert "step 300" in shown
        assert re.search(r"run-0\s+0\.25\b", shown)
        light = browser.run("getComputedStyle(document.body).backgroundColor")
        browser.open(report, WIDTHS[0], scheme="dark")
        assert browser.run("getComputedStyle(document.body).backgroundColor") != light
        assert browser.requests
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data"}
        assert not browser.errors
