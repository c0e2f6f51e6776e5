"""Generated images on disk: numbered PNGs, each whole or absent, and one `.npz` in the layout of ADM's evaluation.

    NAME/000000.png …    image i, six digits or more
    NAME/settings.json   what determines the images, the step of the run among it
    NAME.npz             arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,), the classes; uncompressed

Both are the same bytes whenever they are written of the same images by the same libraries. The `.npz` is packed from
the PNGs one at a time: 50,000 images of 256 px are 10 GB, of which one is in memory.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.base.boundary import Count, open_regular, parse_json, read_regular
from storage.base.errors import UserError
from storage.base.files import partial_name, publish, write_atomic
from storage.base.shown import shown

SETTINGS_FILE = "settings.json"
LABELS_FILE = "labels.txt"
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
NOTED = "card"  # among the settings: what a card needs of them, in its words
OF_WEIGHTS = ("version", "step", "weights_sha256", "weaker_sha256", NOTED)  # settings that differ from run to run
LABEL_DIGITS = 11
NAME_DIGITS = 6
PICTURES = ("PNG",)  # what is written here, and all that is read: of others, EPS would start a program
MAX_PICTURE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Drawn:
    step: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A folder of generated images: what determines them, and how many there are."""

    folder: Path
    settings: dict[str, Any]
    n: int

    @property
    def recipe(self) -> str:
        """What makes image i of one run comparable with image i of another: all settings but the weights."""
        return json.dumps({k: v for k, v in self.settings.items() if k not in OF_WEIGHTS}, sort_keys=True)

    def labels(self) -> list[int] | None:
        """The classes of the images, where they are written down. Raises StoreError for a damaged file."""
        path = self.folder / LABELS_FILE
        try:
            words = read_regular(path).split()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(words) < self.n or not all(word.isdigit() and len(word) < LABEL_DIGITS for word in words):
            return None
        return [int(word) for word in words]


def image_path(folder: Path, i: int) -> Path:
    """Where image i lies."""
    return folder / f"{i:0{NAME_DIGITS}d}.png"


def settings_file_of(images: Path) -> Path:
    """Where `generate` notes how images were drawn, of their folder or its `.npz`."""
    return (images if images.is_dir() else images.with_name(images.stem)) / SETTINGS_FILE


def step_drawn_at(images: Path) -> int | None:
    """The step of the run that generated images, a folder or its `.npz`, are of; None where nothing says so."""
    settings = settings_file_of(images)
    try:
        return parse_json(_Drawn, read_regular(settings), str(settings), "pass --step, or remove the file").step
    except (FileNotFoundError, NotADirectoryError):
        return None


def sets_drawn(folders: Sequence[Path]) -> list[Drawn]:
    """Of folders, those that `generate` wrote images into, the newest last. Raises StoreError for damaged settings."""
    sets = []
    for folder in folders:
        path = folder / SETTINGS_FILE
        try:
            raw, age = read_regular(path), path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            continue
        settings = parse_json(dict[str, Any], raw, str(path), "remove the folder, and generate again")
        if n := n_written(folder):
            sets.append((age, Drawn(folder=folder, settings=settings, n=n)))
    return [drawn for _, drawn in sorted(sets, key=lambda pair: pair[0])]


def write_image(path: Path, pixels: np.ndarray) -> None:
    """A PNG of uint8 (H, W, 3), whole or absent."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="png")
    write_atomic(path, encoded.getvalue(), "generate")


def read_image(path: Path) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a PNG. Raises UserError for what is none, or too large for one, and OSError."""
    from PIL import Image

    data = io.BytesIO(read_regular(path, MAX_PICTURE_BYTES))
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(data, formats=PICTURES) as image,
        ):
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error …
        reason = shown(" ".join(str(error).split()))[:120]
        raise UserError(f"{shown(str(path))} cannot be read as a PNG ({reason}); make it again") from None


def is_whole(path: Path) -> bool:
    """Whether a PNG is there to its end; one that a power cut shortened is not."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            return file.read() == END_OF_PNG
    except (OSError, UserError):  # absent, or shorter than its end, or no file
        return False


def n_written(folder: Path) -> int:
    """How many numbered images there are, without looking inside."""
    return sum(entry.name.endswith(".png") and entry.name[0] != "." for entry in os.scandir(folder))


def pack_npz(
    images: Sequence[Path],
    labels: np.ndarray | None,
    path: Path,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Write the `.npz` of images of one size, and of their labels if any, whole or absent.

    `progress(n)` hears of every n images that are in it.
    """
    aside = partial_name(path, "generate")
    try:
        with open(aside, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # The date is a constant, so that the same images are the same bytes.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    for i, image in enumerate(images):
                        pixels = read_image(image)
                        if i == 0:
                            np.lib.format.write_array_header_1_0(
                                member,
                                {"descr": "|u1", "fortran_order": False, "shape": (len(images), *pixels.shape)},
                            )
                        member.write(pixels.tobytes())
                        progress(1)
                if labels is not None:
                    with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                        np.lib.format.write_array(member, labels, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)
