"""The demo's images: digits in the fonts of matplotlib's wheel, over the built-in photographs.

They need no network, and they are written out as PNG files in an ImageFolder tree, a class a digit, so that listing,
reading and decoding run as they do on ImageNet. What varies is what varies in photographs of objects: shape (a font),
size, place, rotation, slant, colours, light, and a background of low contrast that says nothing of the class.

Every image is a function of (seed, split, digit, number). The splits share no pixel of a background, which are those
of `photos.py`, and no draw. DEMO is the style of the demo's images; the built-in encoders learn from FOR_ENCODERS
(`pipeline/encoders/glyph/`), which varies more and has other fonts, so that they have seen digits and none of those
that the demo trains on.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.sources import photos
from pipeline.sources.leftovers import OWN_FILE
from storage.base.files import write_atomic

RECIPE_VERSION = 1
RESOLUTION = 64  # pixels a side
CLASSES = tuple(string.digits)
SANS, SERIF, MONO, STIX = "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral"
EM = 96  # pixels of the font that a digit is drawn with, before it is scaled
CANVAS = 2 * EM
OVERSAMPLED = 3  # pixels a side that are drawn for one of an image, whose mean makes smooth edges
BRIGHT = ((0.95, 0.94, 0.9), (1.0, 0.65, 0.4), (0.5, 0.68, 1.0))  # white, orange, sky
DARK = ((0.08, 0.08, 0.08), (0.32, 0.12, 0.05), (0.08, 0.14, 0.3))  # black, brown, navy
DARK_PAPER, BRIGHT_PAPER = (0.05, 0.22), (0.8, 0.95)  # mean grey of a background


@dataclass(frozen=True, kw_only=True)
class Style:
    """What digits are drawn in, and how much they vary. Lengths are in images, limits hold both ways."""

    fonts: tuple[str, ...]
    height: tuple[float, float]  # of the longer side of a digit's box
    rotation_deg: float
    slant: float
    shift: float
    contrast: float  # that is left of a photograph
    colour: float  # that is left of its mean colour
    bright: float  # share of bright digits on dark


DEMO = Style(
    fonts=(SANS, f"{SANS}-Bold", f"{SANS}-BoldOblique", f"{SERIF}-Bold", f"{STIX}Bol"),
    height=(0.68, 0.82),
    rotation_deg=6.0,
    slant=0.08,
    shift=0.04,
    contrast=0.12,
    colour=0.3,
    bright=1.0,
)
FOR_ENCODERS = Style(
    fonts=(
        *(MONO, f"{MONO}-Bold", f"{MONO}-BoldOblique", SERIF, STIX, f"{STIX}BolIta"),
        *("cmb10", "cmr10", "cmss10", "cmtt10"),
    ),
    height=(0.6, 0.85),
    rotation_deg=12.0,
    slant=0.15,
    shift=0.07,
    contrast=0.25,
    colour=0.4,
    bright=2 / 3,
)


@cache
def font(name: str) -> ImageFont.FreeTypeFont:
    """One font of matplotlib's wheel."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None, "matplotlib"
    assert spec.origin is not None, "matplotlib"
    return ImageFont.truetype(str(Path(spec.origin).parent / f"mpl-data/fonts/ttf/{name}.ttf"), EM)


@cache
def photograph(name: str) -> Image.Image:
    """A photograph, read once."""
    return photos.load_photograph(name)


@cache
def upright(digit: str, font_name: str) -> tuple[Image.Image, int]:
    """A digit in the middle of a canvas, and the longer side of its box in pixels."""
    left, top, right, bottom = (int(side) for side in font(font_name).getbbox(digit))
    canvas = Image.new("L", (CANVAS, CANVAS))
    place = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(place, digit, fill=255, font=font(font_name))
    return canvas, max(right - left, bottom - top)


def mask(digit: str, font_name: str, style: Style, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel a digit covers, of random size, place, rotation and slant: float32 (side, side)."""
    canvas, longest = upright(digit, font_name)
    side = OVERSAMPLED * RESOLUTION
    scale = longest / (rng.uniform(*style.height) * side)  # the canvas's pixels a pixel
    angle = math.radians(rng.uniform(-style.rotation_deg, style.rotation_deg))
    slant = rng.uniform(-style.slant, style.slant)
    across, down = (0.5 + rng.uniform(-style.shift, style.shift, 2)) * side
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    a, b, d, e = cos, sin + slant * cos, -sin, cos - slant * sin
    middle = CANVAS / 2
    matrix = (a, b, middle - a * across - b * down, d, e, middle - d * across - e * down)
    turned = canvas.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned.reduce(OVERSAMPLED), dtype=np.float32) / 255


def draw(covered: np.ndarray, split: str, style: Style, rng: np.random.Generator) -> np.ndarray:
    """A digit that covers `covered` of each pixel, on a photograph of low contrast: uint8 (side, side, 3).

    Bright on dark or dark on bright; the inks are colours that `tiny-vae` keeps, which knows the photographs.
    """
    crop = photos.random_crop(photograph(photos.CLASSES[rng.integers(len(photos.CLASSES))]), split, rng)
    texture = np.asarray(crop.resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    bright = rng.random() < style.bright
    inks = BRIGHT if bright else DARK
    ink = np.array(inks[rng.integers(len(inks))], dtype=np.float32) + rng.uniform(-0.08, 0.08, 3).astype(np.float32)
    paper = rng.uniform(*(DARK_PAPER if bright else BRIGHT_PAPER)) + style.contrast * (texture - texture.mean((0, 1)))
    paper = paper + style.colour * (texture.mean((0, 1)) - texture.mean())
    image = paper * (1 - covered[..., None]) + ink * covered[..., None]
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def glyph(split: str, label: int, number: int, *, seed: int = 0, style: Style = DEMO) -> tuple[np.ndarray, np.ndarray]:
    """One image of a split, uint8 (side, side, 3), and what its digit covers, float32 (side, side)."""
    rng = np.random.default_rng([seed, list(photos.SPLITS).index(split), label, number])
    covered = mask(CLASSES[label], style.fonts[rng.integers(len(style.fonts))], style, rng)
    return draw(covered, split, style, rng), covered


def write_glyphs(directory: Path, *, n_per_class: int, split: str = "train") -> int:
    """Write `directory/<digit>/<digit>_<number>.png`; returns how many images there are.

    Does nothing when a complete set of the same recipe is there; completes an interrupted one. Raises OSError.
    """
    recipe = {"version": RECIPE_VERSION, "split": split, "n_per_class": n_per_class, "side": RESOLUTION}
    manifest = directory / OWN_FILE
    if not manifest.exists() or json.loads(manifest.read_text()) != recipe:
        for label, number in itertools.product(range(len(CLASSES)), range(n_per_class)):
            digit, (image, _) = CLASSES[label], glyph(split, label, number)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
            path = directory / digit / f"{digit}_{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
        write_atomic(manifest, json.dumps(recipe).encode(), "glyphs")
    return n_per_class * len(CLASSES)
