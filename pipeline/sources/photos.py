"""The built-in photographs: crops of those in the scikit-image and scikit-learn wheels, one class a photograph.

They need no network, and they are written out as JPEG files in an ImageFolder tree, so that listing, reading, decoding
and cropping run as they do on ImageNet. Crops are drawn with a fixed seed; their sides differ, so that the centre crop
has something to do.

The two splits share no pixel: training crops come from the left 72 % of each photograph, held-out crops from the right
25 %. What an encoder does on held-out crops it does on parts of the photographs that it never saw. Another
seed draws other crops of the same part.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.sources.leftovers import OWN_FILE
from pipeline.transforms import formats
from storage.base.files import write_atomic

RECIPE_VERSION = 1
SPLITS = {"train": (0.0, 0.72), "heldout": (0.75, 1.0)}  # share of the width that crops may lie in
CROP_SIDES = (88, 200)  # pixels of the photograph, before scaling
JPEG_SIDE = 160  # the shorter side of a written file
JPEG_QUALITY = 95
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
CLASSES = tuple(sorted(PHOTOGRAPHS))


def load_photograph(name: str) -> Image.Image:
    """One photograph, RGB, from the wheel that ships it."""
    package, _, inside = PHOTOGRAPHS[name].partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    with Image.open(Path(spec.origin).parent / inside, formats=formats()) as image:
        return image.convert("RGB")


def random_crop(photograph: Image.Image, split: str, rng: np.random.Generator) -> Image.Image:
    """A crop of random place, size and (mildly) shape from the split's part of a photograph."""
    left, right = (int(share * photograph.width) for share in SPLITS[split])
    longest = min(right - left, photograph.height)
    width, height = (rng.integers(min(CROP_SIDES[0], longest), min(CROP_SIDES[1], longest) + 1) for _ in range(2))
    width, height = max(width, height * 3 // 4), max(height, width * 3 // 4)
    x = rng.integers(left, right - width + 1)
    y = rng.integers(0, photograph.height - height + 1)
    return photograph.crop((int(x), int(y), int(x + width), int(y + height)))


def crops(split: str, n_per_class: int, seed: int = 0) -> Iterator[tuple[str, int, Image.Image]]:
    """(class name, number, crop) of every crop of a split, the shorter side scaled to JPEG_SIDE."""
    for label, name in enumerate(CLASSES):
        photograph = load_photograph(name)
        rng = np.random.default_rng([seed, label, list(SPLITS).index(split)])
        for number in range(n_per_class):
            crop = random_crop(photograph, split, rng)
            scale = JPEG_SIDE / min(crop.size)
            size = (round(crop.width * scale), round(crop.height * scale))
            yield name, number, crop.resize(size, Image.Resampling.BICUBIC)


def write_photos(directory: Path, *, n_per_class: int = 72, split: str = "train") -> int:
    """Write `directory/<class>/<class>_<number>.JPEG`; returns how many images there are.

    Does nothing when a complete set of the same recipe is there; completes an interrupted one. Raises OSError.
    """
    recipe = {"version": RECIPE_VERSION, "split": split, "n_per_class": n_per_class, "side": JPEG_SIDE}
    manifest = directory / OWN_FILE
    if not manifest.exists() or json.loads(manifest.read_text()) != recipe:
        for name, number, crop in crops(split, n_per_class):
            buffer = io.BytesIO()
            crop.save(buffer, format="JPEG", quality=JPEG_QUALITY)
            path = directory / name / f"{name}_{number:04d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
        write_atomic(manifest, json.dumps(recipe).encode(), "photos")
    return n_per_class * len(CLASSES)
