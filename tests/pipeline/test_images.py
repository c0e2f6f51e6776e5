"""Images from folders, archives and stores: the right ones, in order, in any batch; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import open_images, spread
from pipeline.transforms import center_crop
from storage.errors import UserError
from tests.stores import make_store


def pictures(n: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def save(images: np.ndarray, folder: Path) -> None:
    for i, image in enumerate(images):
        path = folder / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("compress", [False, True])
def test_an_archive_is_read_in_order_and_in_batches(tmp_path: Path, batch: int, compress: bool) -> None:
    images = pictures(7)
    (np.savez_compressed if compress else np.savez)(tmp_path / "a.npz", images, np.arange(7))
    found = open_images(tmp_path / "a.npz")
    parts = list(found.read(batch))
    assert found.n == 7
    assert max(len(part) for part in parts) <= batch
    np.testing.assert_array_equal(np.concatenate(parts), images)
    some = open_images(tmp_path / "a.npz", limit=3)
    np.testing.assert_array_equal(np.concatenate(list(some.read(batch))), images[[0, 3, 6]])


def test_a_folder_is_read_sorted_by_path(tmp_path: Path) -> None:
    images = pictures(5)
    save(images, tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    found = open_images(tmp_path)
    np.testing.assert_array_equal(np.concatenate(list(found.read(2))), images[[0, 2, 4, 1, 3]])


def test_a_folders_images_are_cropped_when_asked(tmp_path: Path) -> None:
    save(pictures(3, 20, 30), tmp_path)
    save(pictures(2, 9, 9), tmp_path / "more")
    with pytest.raises(UserError, match="pass --resolution"):
        list(open_images(tmp_path).read(100))
    cropped = np.concatenate(list(open_images(tmp_path, resolution=8).read(100)))
    assert cropped.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(cropped[0], center_crop(Image.open(tmp_path / "class0" / "000.png"), 8))


def test_a_stores_originals_are_read_without_its_failed_rows(tmp_path: Path) -> None:
    """In the order of rows, cropped to the store's resolution, from the folder that it was made of."""
    images = pictures(7, 140, 150)
    for row, image in enumerate(images):
        path = tmp_path / "data" / f"class{row % 5}" / f"{row:05d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, format="png")
    source = {"kind": "image-folder", "path": str(tmp_path / "data")}
    make_store(tmp_path / "store", n_rows=7, failed_rows=[2], source=source)
    found = open_images(tmp_path / "store")
    rows = [0, 1, 3, 4, 5, 6]
    expected = np.stack([center_crop(Image.fromarray(images[row]), 128) for row in rows])
    assert found.n == 6
    np.testing.assert_array_equal(np.concatenate(list(found.read(4))), expected)
    some = open_images(tmp_path / "store", limit=2, resolution=128)
    np.testing.assert_array_equal(np.concatenate(list(some.read(4))), expected[[0, 5]])
    assert some.record != found.record


def test_the_record_tells_other_images(tmp_path: Path) -> None:
    save(pictures(3), tmp_path)
    before = open_images(tmp_path).record
    assert open_images(tmp_path).record == before
    assert open_images(tmp_path, limit=2).record != before
    assert open_images(tmp_path, resolution=4).record != before
    Image.fromarray(pictures(1)[0]).save(tmp_path / "class0" / "000.png")
    assert open_images(tmp_path).record != before


def test_what_cannot_be_read_is_named(tmp_path: Path, shared_tiny_store: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "none")
    with pytest.raises(UserError, match="holds no image"):
        open_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        list(open_images(tmp_path).read(1))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match=r"arr_0 of .* is float64 \(2, 4, 4, 3\)"):
        open_images(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(2))
    with pytest.raises(UserError, match="has no arr_0"):
        open_images(tmp_path / "other.npz")
    np.savez(tmp_path / "small.npz", pictures(2))
    with pytest.raises(UserError, match="6×6, and --resolution 8"):
        open_images(tmp_path / "small.npz", resolution=8)
    with pytest.raises(UserError, match="128×128, and --resolution 8"):
        open_images(shared_tiny_store, resolution=8)
    with pytest.raises(UserError, match="was not made of images"):
        open_images(shared_tiny_store)
    with pytest.raises(UserError, match="must not be negative"):
        open_images(tmp_path, limit=-1)


def test_spread() -> None:
    assert spread(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
