"""The demo's digits: the same files every time, an ImageFolder tree, labels that are what is drawn, disjoint splits."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.sources import glyphs, open_source, photos
from pipeline.sources.glyphs import CLASSES, DEMO, FOR_ENCODERS, RESOLUTION, font, glyph, mask, upright, write_glyphs


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("*/*.png")}


def test_the_same_files_come_out_every_time_and_no_two_are_alike(tmp_path: Path) -> None:
    assert write_glyphs(tmp_path / "a", n_per_class=2) == 2 * len(CLASSES)
    write_glyphs(tmp_path / "b", n_per_class=2)
    write_glyphs(tmp_path / "heldout", n_per_class=2, split="heldout")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    of_both = [*digests(tmp_path / "a").values(), *digests(tmp_path / "heldout").values()]
    assert len(set(of_both)) == len(of_both) == 4 * len(CLASSES)


def test_it_is_an_image_folder_with_a_class_a_digit(tmp_path: Path) -> None:
    write_glyphs(tmp_path / "a", n_per_class=2)
    listing = open_source(str(tmp_path / "a")).listing()
    assert listing.left_out == ()
    assert listing.index.class_names == list("0123456789")
    assert np.bincount(listing.index.labels).tolist() == [2] * len(CLASSES)
    with Image.open(next((tmp_path / "a").glob("*/*.png"))) as image:
        assert (image.size, image.mode) == ((RESOLUTION, RESOLUTION), "RGB")


def test_a_complete_set_is_left_alone_and_an_interrupted_one_completed(tmp_path: Path) -> None:
    write_glyphs(tmp_path / "a", n_per_class=2)
    whole = digests(tmp_path / "a")
    times_ns = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*/*")}
    write_glyphs(tmp_path / "a", n_per_class=2)
    assert times_ns == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*/*")}
    (tmp_path / "a" / glyphs.OWN_FILE).unlink()  # which comes last
    (tmp_path / "a" / "3" / "3_0001.png").write_bytes(b"half")
    write_glyphs(tmp_path / "a", n_per_class=2)
    assert digests(tmp_path / "a") == whole


def test_the_digit_that_is_drawn_is_the_label() -> None:
    """Without rotation, slant and shift, what is covered is that digit of the font and no other."""
    style = replace(DEMO, rotation_deg=0.0, slant=0.0, shift=0.0, height=(0.75, 0.75))

    def plain(digit: str) -> np.ndarray:
        canvas, longest = upright(digit, DEMO.fonts[0])
        side = round(canvas.width * 0.75 * RESOLUTION / longest)
        edge = (side - RESOLUTION) / 2
        box = (edge, edge, edge + RESOLUTION, edge + RESOLUTION)
        return np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC).crop(box), dtype=float) / 255

    templates = [plain(digit) for digit in CLASSES]
    for digit in CLASSES:
        covered = mask(digit, DEMO.fonts[0], style, np.random.default_rng(0))
        apart = [np.abs(template - covered).mean() for template in templates]
        assert CLASSES[int(np.argmin(apart))] == digit
        assert min(apart) < 0.03


def test_a_digit_stands_out_and_lies_within_the_image() -> None:
    for number, style in itertools.product(range(20), (DEMO, FOR_ENCODERS)):
        image, covered = glyph("train", number % 10, number, style=style)
        light = image.astype(float).mean(-1)
        inside, outside = light[covered > 0.9], light[covered < 0.1]
        assert abs(inside.mean() - outside.mean()) > 60
        edge = np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]])
        assert edge.mean() < 0.05
        assert 0.02 < covered.mean() < 0.5


def test_the_encoders_fonts_are_others_than_the_demo_s() -> None:
    fonts = (*DEMO.fonts, *FOR_ENCODERS.fonts)
    assert len({font(name).getname() for name in fonts}) == len(set(fonts)) == len(fonts)


def test_the_splits_take_backgrounds_from_parts_that_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `test_photos.py` shows of `random_crop`, given the split."""
    asked = []
    crop = photos.random_crop
    monkeypatch.setattr(photos, "random_crop", lambda image, split, rng: asked.append(split) or crop(image, split, rng))
    glyph("train", 0, 0)
    glyph("heldout", 0, 0)
    assert asked == ["train", "heldout"]
