"""Images from folders, archives and stores: the right ones, in order, in any batch; what cannot be read is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Images, open_images, spread
from pipeline.sources.protocol import Unreadable
from pipeline.transforms import center_crop
from storage.base.errors import UserError
from tests.archives import write_npz
from tests.stores import make_store


def pictures(n: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def save(images: np.ndarray, folder: Path) -> None:
    for i, image in enumerate(images):
        path = folder / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def everything(found: Images) -> np.ndarray:
    return np.stack(list(found.read(range(len(found.names)))))  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", [False, True])
def test_an_archive_is_read_in_order(tmp_path: Path, compress: bool) -> None:
    images = pictures(7)
    (np.savez_compressed if compress else np.savez)(tmp_path / "a.npz", images, np.arange(7))
    found = open_images(tmp_path / "a.npz")
    assert len(found.names) == 7
    np.testing.assert_array_equal(everything(found), images)
    np.testing.assert_array_equal(np.stack(list(found.read([2, 5]))), images[[2, 5]])  # type: ignore[arg-type]
    np.testing.assert_array_equal(everything(open_images(tmp_path / "a.npz", limit=3)), images[[0, 3, 6]])


def test_a_folder_is_read_sorted_by_path(tmp_path: Path) -> None:
    images = pictures(5)
    save(images, tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    found = open_images(tmp_path)
    np.testing.assert_array_equal(everything(found), images[[0, 2, 4, 1, 3]])


def test_a_folders_images_are_cropped_when_asked(tmp_path: Path) -> None:
    save(pictures(3, 20, 30), tmp_path)
    save(pictures(2, 9, 9), tmp_path / "more")
    cropped = everything(open_images(tmp_path, resolution=8))
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
    np.testing.assert_array_equal(everything(found), expected)
    some = open_images(tmp_path / "store", limit=2, resolution=128)
    np.testing.assert_array_equal(everything(some), expected[[0, 5]])
    assert some.keys == [found.keys[0], found.keys[5]]
    (tmp_path / "data" / "class3" / "00003").write_bytes(b"no picture")
    assert [isinstance(image, Unreadable) for image in found.read(range(6))] == [False, False, True, *3 * [False]]


def test_an_image_that_changed_has_another_key_even_with_its_old_time(tmp_path: Path) -> None:
    save(pictures(3), tmp_path)
    before = open_images(tmp_path).keys
    assert open_images(tmp_path).keys == before
    assert open_images(tmp_path, limit=2).keys == before[::2]
    assert not set(open_images(tmp_path, resolution=4).keys) & set(before)
    changed = tmp_path / "class0" / "000.png"
    status, data = changed.stat(), bytearray(changed.read_bytes())
    data[-20] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [a == b for a, b in zip(open_images(tmp_path).keys, before, strict=True)] == [False, True, True]
    np.savez(tmp_path / "a.npz", pictures(2))
    archived = open_images(tmp_path / "a.npz").keys
    np.savez(tmp_path / "a.npz", pictures(2)[::-1])
    assert not set(archived) & set(open_images(tmp_path / "a.npz").keys)


def test_links_to_folders_and_to_files_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    images, links = pictures(4), tmp_path / "links"
    save(images, tmp_path / "full")
    links.mkdir()
    (links / "class0").symlink_to(tmp_path / "full" / "class0")
    (links / "class1").mkdir()
    for name in ("001.png", "003.png"):
        (links / "class1" / name).symlink_to(tmp_path / "full" / "class1" / name)
    (links / "class1" / "again").symlink_to("..")
    (links / "class1" / "itself").symlink_to(".")
    (links / "there").symlink_to(tmp_path / "gone.png")
    found = open_images(links)
    np.testing.assert_array_equal(everything(found), everything(open_images(tmp_path / "full")))
    assert sorted(found.left_out) == ["class1/again", "class1/itself"]
    (links / ".lock").touch()  # of `generate`, which everybody's samples have
    (links / ".hidden").touch()
    assert sorted(open_images(links).left_out) == [".hidden", "class1/again", "class1/itself"]
    (links / "class1" / "gone.png").symlink_to(tmp_path / "gone.png")
    assert [
        name
        for name, image in zip(open_images(links).names, open_images(links).read(range(5)), strict=True)
        if isinstance(image, Unreadable)
    ] == ["class1/gone.png"]


def test_dot_files_and_dot_folders_and_pipes_are_no_images(tmp_path: Path) -> None:
    save(pictures(2), tmp_path)
    save(pictures(3), tmp_path / ".thumbnails")
    (tmp_path / "._a.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert open_images(tmp_path).names == ["class0/000.png", "class1/001.png"]


def test_what_cannot_be_read_is_named(tmp_path: Path, shared_tiny_store: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "none")
    with pytest.raises(UserError, match="holds no image"):
        open_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (image,) = open_images(tmp_path).read([0])
    assert isinstance(image, Unreadable)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        open_images(tmp_path / "pipe")
    write_npz(tmp_path / "huge.npz", arr_0=("|u1", (1, 10**6, 10**6, 3)))
    with pytest.raises(UserError, match="said to be 1 images of 1000000×1000000, too large"):
        open_images(tmp_path / "huge.npz")
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
