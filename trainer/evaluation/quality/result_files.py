"""Where results of images lie: IMAGES-evaluation/ENCODER.json, beside the images."""

from __future__ import annotations

import re
from pathlib import Path


def folder_of(images: Path, out: Path | None = None) -> Path:
    """The folder of the results of images: as said, else beside them."""
    name = images.name if images.is_dir() else images.stem
    return out or images.absolute().with_name(f"{name}-evaluation")


def file_name(label: str) -> str:
    """A label as a part of a file's name: an encoder may be spelled as a path, and a file may say anything."""
    return re.sub(r"[^\w.=+-]", "-", label, flags=re.ASCII)[:100]


def result_file(folder: Path, label: str) -> Path:
    """Where a result lies."""
    return folder / f"{file_name(label)}.json"
