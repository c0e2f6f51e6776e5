"""From the encoded bytes of an image to the uint8 square that every encoder is given: decode, ADM centre crop.

Decoding follows the public preprocessing, which is Pillow's `.convert("RGB")`, where that is well defined:

- transparency is dropped, not composited on a background: a transparent pixel keeps the colour stored under it;
- EXIF orientation is not applied, the pixels are taken as they are stored; colour profiles are not applied either;
- CMYK and YCCK JPEGs are taken as Adobe stores them, inverted, and become RGB by Pillow's formula (ImageNet has 22);
- of an animation or a file of several pages the first is taken, of an icon the largest;
- the name's extension is ignored, the bytes decide (ImageNet has a PNG named .JPEG), among the formats of PICTURES;
- 16-bit samples keep their high byte (Pillow would clip grey ones at 255, which turns most pictures white).

Whatever cannot be decoded is a `DecodeError` with the reason, so that the caller can record it with the sample's key:
what is empty, truncated, damaged beyond its decoder, or larger than Pillow's limit of 179 million pixels; samples of 32
bits or floating point, which do not say what is white; and formats that are not named here: of those that Pillow knows,
EPS is a program that it would run with Ghostscript, IPTC a wrapping of anything, EPS too.

Limit: a JPEG decoder does not know that a picture is wrong when bits within it are, or when the end is cut off and the
end marker put back; such pictures come out as libjpeg decodes them, as everywhere else.
"""

from __future__ import annotations

import io
import logging
import warnings
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow is asked to recognise, in this order; the last have no mark of their own at their beginning.
PICTURES = tuple("JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM ICO QOI SGI PCX DIB TGA".split())
EPS_STARTS = (b"%!PS", b"\xc5\xd0\xd3\xc6")

SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
NO_WHITE_MODES = {"I": "32-bit samples", "F": "floating-point samples"}
SCALED_TO_16_BITS = frozenset({"PPM"})  # formats whose plugin gives mode I with 65535 for white
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its complaints about odd files go to stderr
MAX_RESIZED_PIXELS = 2**28  # 805 MB of RGB; a 1-pixel-wide strip would otherwise be enlarged without bound


class DecodeError(Exception):
    """An image that cannot be used; the message is the reason."""


@cache
def formats() -> tuple[str, ...]:
    """PICTURES, without those that this Pillow was built without."""
    Image.init()
    return tuple(name for name in PICTURES if name in Image.OPEN)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB. Raises DecodeError with the reason."""
    if not data:
        raise DecodeError("empty file (0 bytes)")
    if data.startswith(EPS_STARTS):
        raise DecodeError("EPS is a program that would be run")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=formats()) as image:
            return _to_rgb(image)
    except (DecodeError, MemoryError):
        raise  # a lack of memory is this machine's trouble, not the image's
    except UnidentifiedImageError:
        raise DecodeError(f"not an image in a format that is read here (first bytes {data[:8]!r})") from None
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if min(image.size) < 1:
        raise DecodeError(f"no pixels: {image.width}×{image.height}")
    image.load()
    if image.mode in SIXTEEN_BIT_MODES or (image.mode == "I" and image.format in SCALED_TO_16_BITS):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in NO_WHITE_MODES:
        raise DecodeError(f"{NO_WHITE_MODES[image.mode]} ({image.format}): nothing says which number is white")
    return image.convert("RGB")
