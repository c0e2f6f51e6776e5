"""From the encoded bytes of an image to the uint8 square that every encoder is given: decode, ADM centre crop, flip.

Decoding follows the public preprocessing, which is Pillow's `.convert("RGB")`, where that is well defined:

- transparency is dropped, not composited on a background: a transparent pixel keeps the colour stored under it;
- EXIF orientation is not applied, the pixels are taken as they are stored;
- of an animation the first frame is taken; the name's extension is ignored, the bytes decide;
- 16-bit samples keep their high byte (Pillow would clip them at 255, which turns most pictures white).

Whatever cannot be decoded is a `DecodeError` with the reason, so that the caller can record it with the sample's key.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
MAX_RESIZED_PIXELS = 2**28  # 805 MB of RGB; a 1-pixel-wide strip would otherwise be enlarged without bound


class DecodeError(Exception):
    """An image that cannot be used; the message is the reason."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB. Raises DecodeError for empty, truncated, oversized and foreign data.

    Pillow's limit against decompression bombs, 179 million pixels, holds.
    """
    if not data:
        raise DecodeError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode in SIXTEEN_BIT_MODES:
                return _high_byte(image).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise DecodeError(f"not an image in a format that Pillow reads (first bytes {data[:8]!r})") from None
    except MemoryError:
        raise  # this machine's trouble, not the image's
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise DecodeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop (Dhariwal & Nichol 2021, arXiv 2105.05233): uint8 (size, size, 3).

    Halve with a box filter while the short side is at least 2 · size, bring the short side to `size` with a bicubic
    filter, cut the middle. Raises DecodeError for a strip so long that its resized form would not fit in memory.
    """
    assert image.mode == "RGB", image.mode
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_RESIZED_PIXELS:
        raise DecodeError(f"too elongated: {image.width}×{image.height} would become {width}×{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def hflip(images: np.ndarray) -> np.ndarray:
    """Mirror images (..., H, W, 3) left to right, contiguously."""
    return np.ascontiguousarray(images[..., ::-1, :])


def _high_byte(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    if image.mode == "I" and samples.size and samples.max() <= 255:
        return Image.fromarray(samples.clip(0, 255).astype(np.uint8))
    return Image.fromarray((samples.clip(0, 2**16 - 1) >> 8).astype(np.uint8))
