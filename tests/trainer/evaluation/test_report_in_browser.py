"""What a real browser makes of the report: pictures, clicks, widths, colours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import BINARY, Browser
from trainer.evaluation.report.page import write_report

WIDTHS = (390, 1280, 1920)
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
        assert browser.run("document.querySelector('dialog p').innerText") == "vanilla-seed0: class2"
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
