"""From encoded bytes to the RGB square that every encoder sees: decode, then the ADM centre crop.

Decoding follows the public preprocessing of ADM and REPA: Pillow decodes whatever the bytes are (the extension is not
asked), then `.convert("RGB")`. So CMYK and YCCK JPEGs, grey, palette and 1-bit images become RGB by Pillow's rules;
transparency is dropped, not composited; the first frame of an animation is taken; EXIF rotation is not applied. One
case is mended: Pillow clips 16-bit grey to 8 bits, so those are scaled by 1/257 first.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


class DecodeError(Exception):
    """An image cannot be decoded; the message is the reason, for the sample's record."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode one image to Pillow's RGB mode. Raises DecodeError with the reason when the bytes cannot be decoded."""
    if not data:
        raise DecodeError("zero bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on and refuses from twice that; a bomb is refused at the warning already.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # palette transparency in bytes, truncated EXIF
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.mode in SIXTEEN_BIT_MODES:
                    return Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"too many pixels: {error}") from error
    except UnidentifiedImageError:
        raise DecodeError(f"not an image that Pillow {Image.__version__} knows") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and others
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal & Nichol, arXiv 2105.05233), uint8 (size, size, 3).

    Halve with a box filter while the shorter side is at least twice `size`; resize with bicubic so that the shorter
    side is `size`; cut the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
