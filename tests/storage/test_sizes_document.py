"""The README's table of what ImageNet takes says what the codecs store."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np

from storage.codecs import CODECS

IMAGES, TOKENS_AN_IMAGE = 1_281_167, 256
WIDTHS = {"S": 384, "B": 768, "L": 1024, "g": 1536}


def test_every_codec_and_width_has_its_size() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.M)
    assert [spelling for spelling, _ in rows] == ["float16", "int8", "rotated4", "rotated2", "rotated1"]
    assert {spelling for spelling, _ in rows} == set(CODECS)
    for spelling, cells in rows:
        for width, cell in zip(WIDTHS.values(), cells.split("|"), strict=True):
            arrays = CODECS[spelling].arrays(TOKENS_AN_IMAGE, width).values()
            n_bytes = sum(np.dtype(array.dtype).itemsize * prod(array.row_shape) for array in arrays)
            assert cell.strip() == f"{round(n_bytes * IMAGES / 1e9):,} GB", (spelling, width)
