"""Decoding a unit: read, decode and crop its images into one stacked array. Runs as a Ray task on any CPU.

One stacked array, not a list: Ray hands a stacked array to the encoder without a copy, and pickles a list.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pipeline.sources import Source
from pipeline.transforms import DecodeError, center_crop, decode_rgb
from storage import Failure


def decode_unit(
    source: Source, first_row: int, keys: Sequence[str], locations: Sequence[str], resolution: int
) -> tuple[np.ndarray, tuple[list[Failure], float]]:
    """Decode and centre-crop a unit's samples.

    Returns uint8 (n, resolution, resolution, 3), zeros where a sample failed, and (failures, seconds). A sample that is
    absent, unreadable or undecodable is a failure with its reason; any other error of reading is raised, so that the
    unit is tried again.
    """
    start_s = time.perf_counter()
    images = np.zeros((len(keys), resolution, resolution, 3), dtype=np.uint8)
    failures = []
    for i, (key, location) in enumerate(zip(keys, locations, strict=True)):
        try:
            images[i] = center_crop(decode_rgb(source.read(location)), resolution)
        except DecodeError as error:
            failures.append(Failure(row=first_row + i, key=key, reason=str(error)))
        except (FileNotFoundError, PermissionError) as error:
            failures.append(Failure(row=first_row + i, key=key, reason=f"cannot be read: {error.strerror}"))
    return images, (failures, time.perf_counter() - start_s)
