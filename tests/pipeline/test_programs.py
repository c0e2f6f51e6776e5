"""No picture starts a program, whatever it is named and wherever it lies."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.decode import decode_unit
from pipeline.sources import open_source
from pipeline.transforms import PICTURES, formats
from tests.pipeline.containers import Labelled, write_image_folder
from tests.pipeline.zoo import ZOO, encode, iptc, picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a stand-in for Ghostscript writes when it is started, which works as Pillow expects."""
    log, programs = tmp_path / "started", tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "gswin32c", "djpeg", "ppmtogif"):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {log}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for anew
    return log


@pytest.mark.parametrize("wrapped", [bytes, iptc])
def test_the_stand_in_is_what_pillow_would_start(
    started: Path, tmp_path: Path, wrapped: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "x.jpg").write_bytes(wrapped(encode(picture(), "EPS")))
    with pytest.raises(OSError, match="cannot identify"), Image.open(tmp_path / "x.jpg") as image:  # of its output
        image.load()
    assert "gs -q" in started.read_text()


def test_nothing_of_the_zoo_starts_a_program(started: Path, tmp_path: Path) -> None:
    samples = sorted(Labelled("a", f"{animal.name}.jpg", animal.data) for animal in ZOO if not animal.is_good)
    source = open_source(write_image_folder(tmp_path / "zoo", samples))
    index = source.listing().index
    _, (failures, *_) = decode_unit(source, 0, index.keys, index.locations, 128)
    reasons = {Path(failure.key).stem: failure.reason for failure in failures}
    assert len(reasons) == len(samples)
    assert "EPS is a program" in reasons["eps-program"]
    assert not started.exists()


def test_every_format_is_one_that_pillow_knows_and_none_runs_anything() -> None:
    assert set(formats()) == set(PICTURES) & set(Image.OPEN)
    assert not {"EPS", "WMF", "IPTC", "FITS", "BUFR", "GRIB", "HDF5", "PDF", "MPEG", "PSD"} & set(PICTURES)


def test_pillow_is_never_asked_to_guess_among_all_its_formats() -> None:
    """Every `Image.open` of the product names its formats."""
    found = 0
    folders = ("pipeline", "trainer", "storage", "benchmarks")
    for path in [path for name in folders for path in (ROOT / name).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
                found += 1
    assert found >= 3
