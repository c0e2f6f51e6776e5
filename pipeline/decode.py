"""Decoding a unit: read, decode and crop its images into one stacked array. Runs as a Ray task on any CPU.

One stacked array, not a list: Ray hands a stacked array to the encoder without a copy, and pickles a list.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.sources.protocol import Sample, Source, Unreadable
from pipeline.transforms import DecodeError, center_crop, decode_rgb
from storage import Failure
from storage.samples import UNREAD, sample_crc32c


def decode_unit(
    source: Source, first_row: int, keys: Sequence[str], locations: Sequence[str], resolution: int
) -> tuple[np.ndarray, tuple[list[Failure], dict[str, float], np.ndarray]]:
    """Decode and centre-crop a unit's samples.

    Returns uint8 (n, resolution, resolution, 3), zeros where a sample failed, and (failures, seconds of a stage: read,
    decode, crop; CRC-32C of each sample's bytes, uint32 (n,), UNREAD where there are none). A sample that cannot be
    read or decoded is a failure with its reason; a container that cannot be read is raised, so that the unit is tried
    again.
    """
    images = np.zeros((len(keys), resolution, resolution, 3), dtype=np.uint8)
    crcs = np.full(len(keys), UNREAD, dtype=np.uint32)
    failures = []
    timings_s = {"read": 0.0, "decode": 0.0, "crop": 0.0}
    at_s = time.perf_counter()

    def took(stage: str) -> None:
        nonlocal at_s
        now_s = time.perf_counter()
        timings_s[stage] += now_s - at_s
        at_s = now_s

    for i, (key, sample) in enumerate(zip(keys, source.read_many(locations), strict=True)):
        if not isinstance(sample, Unreadable):
            crcs[i] = sample_crc32c(sample)
        took("read")
        try:
            image = to_rgb(sample)
            took("decode")
            images[i] = center_crop(image, resolution)
        except DecodeError as error:
            failures.append(Failure(row=first_row + i, key=key, reason=str(error)))
        took("crop")
    took("read")
    return images, (failures, timings_s, crcs)


def to_rgb(sample: Sample) -> Image.Image:
    """A sample as an RGB picture. Raises DecodeError."""
    if isinstance(sample, Unreadable):
        raise DecodeError(sample.reason)
    return decode_rgb(sample) if isinstance(sample, bytes) else Image.fromarray(sample)
