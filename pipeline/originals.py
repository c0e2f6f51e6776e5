"""The images that rows of a store were made of, cropped as they were encoded: OUT/ROW.png.

They are read from the source that the store names; one that is gone or not what it was is named, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.preview import read_originals
from pipeline.sources.protocol import Unreadable
from storage import UserError, open_store


@dataclass(frozen=True, kw_only=True)
class Original:
    """A row, its picture, and why there is none where it is None."""

    row: int
    path: Path | None
    reason: str = ""


def write_originals(root: str, rows: Sequence[int], out: Path) -> list[Original]:
    """Write the pictures. Raises UserError for a row that the store lacks, and for a source that is not there."""
    store = open_store(root)
    for row in rows:
        if not 0 <= row < store.n_rows:
            raise UserError(f"--rows must be of the store's {store.n_rows:,} rows, from 0, got {row}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for row, image in zip(rows, read_originals(store)(np.array(rows)), strict=True):
        if isinstance(image, Unreadable):
            written.append(Original(row=row, path=None, reason=image.reason))
            continue
        path = out / f"{row}.png"
        Image.fromarray(image).save(path)
        written.append(Original(row=row, path=path))
    return written
