"""Pictures inside the page: as JPEGs, whose sizes are chosen so that all of them together stay below PAGE_BYTES.

A picture is read, made smaller where it has to be, and encoded; PNGs of noisy samples would be four times as large.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PAGE_BYTES = 3_000_000  # of JPEGs; base64 makes them a third larger
SIDES = (1.0, 0.75, 0.5, 0.375, 0.25)  # shares of the largest sides, tried in turn
QUALITY = 90
LEAST_SIDE = 64


def encoded(pictures: Mapping[str, np.ndarray], most: Mapping[str, int]) -> dict[str, str]:
    """Data URIs of pictures uint8 (H, W, 3), each at most so many pixels a side, less where all would be too large."""
    uris: dict[str, bytes] = {}
    for share in SIDES:
        uris = {name: _jpeg(pixels, max(LEAST_SIDE, int(most[name] * share))) for name, pixels in pictures.items()}
        if sum(map(len, uris.values())) <= PAGE_BYTES:
            break
    return {name: f"data:image/jpeg;base64,{base64.b64encode(raw).decode()}" for name, raw in uris.items()}


def _jpeg(pixels: np.ndarray, side: int) -> bytes:
    from PIL import Image

    image: Any = Image.fromarray(pixels)
    image.thumbnail((side, side))
    raw = io.BytesIO()
    image.save(raw, format="jpeg", quality=QUALITY, subsampling=0)
    return raw.getvalue()


def spread_over(labels: Sequence[int] | None, n: int, most: int) -> list[int]:
    """Numbers of at most so many images: the first one of each class first, then the first ones left."""
    if labels is None:
        return list(range(min(n, most)))
    firsts = list({label: i for i, label in reversed(list(enumerate(labels[:n])))}.values())
    chosen = sorted(firsts)[:most]
    others = [i for i in range(n) if i not in set(chosen)]
    return sorted(chosen + others[: most - len(chosen)])
