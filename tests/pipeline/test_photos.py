"""The built-in photographs: the same files every time, an ImageFolder tree, and two splits that share no pixel."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.sources import photos
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.photos import CLASSES, crops, load_photograph, random_crop, write_photos


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("*/*.JPEG")}


def test_the_same_files_come_out_every_time(tmp_path: Path) -> None:
    assert write_photos(tmp_path / "a", n_per_class=3) == 3 * len(CLASSES)
    write_photos(tmp_path / "b", n_per_class=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(set(digests(tmp_path / "a").values())) == 3 * len(CLASSES)


def test_the_default_is_at_least_a_thousand_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photos, "crops", lambda *args: iter(()))  # the count only
    assert write_photos(tmp_path / "a") >= 1000


def test_it_is_an_image_folder_with_a_class_a_photograph(tmp_path: Path) -> None:
    write_photos(tmp_path / "a", n_per_class=2)
    listing = ImageFolder(str(tmp_path / "a")).listing()
    assert listing.left_out == ()
    assert listing.index.class_names == list(CLASSES)
    assert np.bincount(listing.index.labels).tolist() == [2] * len(CLASSES)


def test_a_complete_set_is_left_alone_and_an_interrupted_one_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(split: str, n_per_class: int) -> object:
        for number, crop in enumerate(crops(split, n_per_class)):
            if number == 5:
                raise KeyboardInterrupt
            yield crop

    with monkeypatch.context() as patch:
        patch.setattr(photos, "crops", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_photos(tmp_path / "a", n_per_class=2)
    write_photos(tmp_path / "a", n_per_class=2)
    write_photos(tmp_path / "b", n_per_class=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    times_ns = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*/*")}
    write_photos(tmp_path / "a", n_per_class=2)
    assert times_ns == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*/*")}


def test_crops_differ_in_shape_and_are_larger_than_the_encoders_crop() -> None:
    sizes = [crop.size for _, _, crop in crops("train", 4)]
    assert min(min(size) for size in sizes) > 128
    assert sum(width != height for width, height in sizes) > len(sizes) / 2


@pytest.mark.parametrize("name", CLASSES)
def test_the_splits_share_no_pixel(name: str) -> None:
    """A photograph whose pixels hold their own column shows which columns a crop took."""
    width, height = load_photograph(name).size
    column = np.broadcast_to(np.arange(width), (height, width))
    marked = Image.fromarray(np.stack([column // 256, column % 256, 0 * column], axis=-1).astype(np.uint8))
    seen = {}
    for split in photos.SPLITS:
        rng = np.random.default_rng(0)
        taken = [np.asarray(random_crop(marked, split, rng)).astype(int) for _ in range(200)]
        seen[split] = {int(c) for crop in taken for c in np.unique(crop[0, :, 0] * 256 + crop[0, :, 1])}
    assert seen["train"]
    assert not seen["train"] & seen["heldout"]
