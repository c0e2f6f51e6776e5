"""What each setting of a protocol does to a number: one model, one reference, one setting changed at a time.

    python -m benchmarks.protocol_effects runs/demo/repa --n 2048 [--data SOURCE] [--other-reference STORE] \
        [--second-weights LITE0.pth [--third-weights LITE1.pth] [--many 10000 50000]]

SOURCE are the images of the run's store as `python -m pipeline precompute --data` took them: they are cut once more as
torchvision does it (short side by bilinear interpolation, then the middle), where ADM and this project halve by boxes
and end with a bicubic filter. STORE holds other images of the same classes, such as a held-out part.

With the weights of `benchmarks.effect.second_encoder` a second table has what one name may stand for: the first images
in EfficientNet-Lite0 as it was trained, padded as another library pads, fed with images brought to its size otherwise,
and in the next network of the family. --many adds a third, of many more images (drawn by the ODE in few steps, since
their number is what matters there) and of fewer among them.

Every row is drawn from the same seeds, so that the rows' common part of the noise cancels between them; the interval is
of the first row's choice of images. Described by the built-in encoder unless another is named, against the originals of
the run's store. Images are kept below the output folder, and a second call measures what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from benchmarks.effect.second_encoder import Network, Size, describe
from benchmarks.report import table
from pipeline.decode import to_rgb
from pipeline.sources import open_source
from storage import open_store
from storage.base.choices import Device, Token
from storage.roots import absolute
from trainer.evaluation.generate.generate import generate
from trainer.evaluation.generate.image_files import read_image
from trainer.evaluation.options import GenerateConfig
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.quality.result_files import file_name, result_file
from trainer.run.folder import RunFolder

BASE = {"sampler": "sde", "labels": "balanced", "rounding": "round", "guidance": 1.0}
DRAWN: dict[str, dict[str, Any]] = {
    "base: SDE, balanced labels, rounded, no guidance": {},
    "random labels": {"labels": "random"},
    "ODE (Euler)": {"sampler": "ode"},
    "half the steps": {"steps": 0.5},
    "truncated": {"rounding": "truncate"},
    "guidance 1.8 up to 0.7": {"guidance": 1.8, "guidance_high": 0.7},
    "another seed": {"seed": 1},
    "guidance 1.8 everywhere": {"guidance": 1.8, "guidance_low": 0.0, "guidance_high": 1.0},
}
JPEG_QUALITIES = (75, 95)  # Pillow's default, and what is often asked for
METRICS = ("fid", "fd", "kid", "kd", "precision", "recall", "density", "coverage")


def measured(folder: Path, where: Path, reference: str, description: Description, **options: Any) -> dict[str, Any]:
    """The metrics of a folder of images, read where they were measured before."""
    file = result_file(where, description.label)
    if not file.is_file():
        cache = where.parent / "reference-features"  # described once for all rows
        evaluate(folder, reference, description, out=where, cache=cache, resamples=1000, **options)
    found: dict[str, Any] = json.loads(file.read_text())["metrics"]
    return found


def cut_by_torchvision(data: str, side: int, file: Path) -> None:
    """Write a source's images as torchvision's Resize(side) and CenterCrop(side) cut them: .npz with `arr_0`."""
    source = open_source(absolute(data))
    cut = []
    for sample in source.read_many(source.listing().index.locations):
        image = to_rgb(sample)
        scale = side / min(image.size)
        width, height = max(side, int(image.width * scale)), max(side, int(image.height * scale))
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        left, top = round((width - side) / 2), round((height - side) / 2)
        cut.append(resized[top : top + side, left : left + side])
    np.savez(file, arr_0=np.stack(cut))


def as_jpeg(images: Path, quality: int, folder: Path) -> None:
    """Write a folder of images once more, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(images.glob("*.png")):
        Image.fromarray(read_image(path)).save(folder / f"{path.stem}.jpg", quality=quality)


def rows(
    run: Path,
    out: Path,
    n: int,
    steps: int,
    precision: str,
    description: Description,
    data: str,
    other: str,
    other_encoders: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Metrics by what was changed."""
    reference = RunFolder(run).read_config().config.store
    settings: dict[str, Any] = {**BASE, "precision": precision, "device": description.device}
    base = GenerateConfig(run=run, n=n, steps=steps, **settings)
    found = {}
    other_precision = "bf16" if precision == "fp32" else "fp32"
    drawn = {**DRAWN, f"{other_precision}, not {precision}": {"precision": other_precision}}
    for number, (name, changes) in enumerate(drawn.items()):
        wanted = {**changes, **({"steps": max(2, int(steps * changes["steps"]))} if "steps" in changes else {})}
        folder, *_ = generate(replace(base, out=out / f"images-{number}", **wanted))
        found[name] = measured(folder, out / f"numbers-{number}", reference, description)
    fewer, *_ = generate(replace(base, n=n // 5, out=out / "images-fewer"))
    found[f"{n // 5:,} images, not {n:,}"] = measured(fewer, out / "numbers-fewer", reference, description)
    images = out / "images-0"
    half = next(iter(found["base: SDE, balanced labels, rounded, no guidance"].values()))["n_reference"] // 2
    found[f"{half:,} of the reference"] = measured(
        images, out / "numbers-half", reference, description, n_reference=half
    )
    if other:
        found["the reference is held out"] = measured(images, out / "numbers-other", other, description)
    for encoder in other_encoders:
        described = replace(description, encoder=encoder)
        found[f"described by {encoder}"] = measured(images, out / f"numbers-{file_name(encoder)}", reference, described)
    if data:
        cut = out / "reference-torchvision.npz"
        if not cut.is_file():
            cut_by_torchvision(data, open_store(reference).resolution, cut)
        found["the reference is cut by torchvision"] = measured(images, out / "numbers-cut", str(cut), description)
    for quality in JPEG_QUALITIES:
        saved = out / f"images-jpeg-{quality}"
        if not saved.is_dir():
            as_jpeg(images, quality, saved)
        found[f"saved as JPEG, quality {quality}"] = measured(
            saved, out / f"numbers-jpeg-{quality}", reference, description
        )
    return found


def as_networks(
    images: Path, reference: str, out: Path, weights: Mapping[Size, Path], device: Device
) -> dict[str, dict[str, Any]]:
    """Metrics of the same images in networks that go by nearly the same name."""
    networks = {
        "EfficientNet-Lite0, as it was trained": Network(),
        "padded as another library pads": Network(padding="torch"),
        "images brought to 224 pixels by bilinear interpolation": Network(resize="bilinear"),
        **({"EfficientNet-Lite1": Network(size="lite1")} if "lite1" in weights else {}),
    }
    return {
        title: in_network(images, reference, out, weights[network.size], device, network)
        for title, network in networks.items()
    }


def of_many(
    base: GenerateConfig, reference: str, out: Path, weights: Path, device: Device, numbers: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Metrics of many images and of fewer among them, evenly spread, the first number first."""
    images, *_ = generate(replace(base, n=max(numbers), sampler="ode", out=out / f"images-of-{max(numbers)}"))
    return {
        f"{n:,} images": in_network(images, reference, out, weights, device, Network(), n)
        for n in dict.fromkeys(numbers)
    }


def in_network(
    images: Path, reference: str, out: Path, weights: Path, device: Device, network: Network, n: int = 0
) -> dict[str, Any]:
    """Metrics of a folder of images (or of `n` of them) in a network's features."""
    described = out / f"{images.name}-{network.name}{f'-{n}' if n else ''}.npz"
    of_reference = out / f"reference-{network.name}.npz"
    describe(str(images), weights, described, n, device, network)
    describe(reference, weights, of_reference, 0, device, network)
    folder = out / f"numbers-{described.stem}"
    file = result_file(folder, network.name)
    if not file.is_file():
        evaluate(described, of_reference, Description(encoder=network.name, device=device), out=folder)
    found: dict[str, Any] = json.loads(file.read_text())["metrics"]
    return found


def lines(found: dict[str, dict[str, Any]]) -> str:
    """Values of the first row with their intervals, of the others with what they are more."""
    first = next(iter(found.values()))
    names = [name for name in METRICS if name in first]
    cells = []
    for i, (title, metrics) in enumerate(found.items()):
        row = [title]
        for name in names:
            if name not in metrics:  # too few images for it
                row.append("–")
                continue
            value, ends = metrics[name]["value"], metrics[name].get("interval")
            spread = f" ({ends[0]:.4g} to {ends[1]:.4g})" if ends else ""
            row.append(f"{value:.4g}{spread}" if i == 0 else f"{value:.4g} ({value - first[name]['value']:+.3g})")
        cells.append(row)
    return table(["", *names], cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32", help="of the model")
    parser.add_argument("--encoder", default="tiny-vit", help="describes images, as `python -m pipeline features` does")
    parser.add_argument("--weights", type=Path, help="its weight file")
    parser.add_argument("--token", choices=get_args(Token), default="cls", help="its vector")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/protocol-effects"))
    parser.add_argument("--data", default="", help="the run's images in full size, to be cut otherwise")
    parser.add_argument("--other-reference", default="", help="a store of other images of the same classes")
    parser.add_argument(
        "--other-encoders", nargs="*", default=(), help="describe by these as well, of the same weights"
    )
    parser.add_argument("--second-weights", type=Path, help="EfficientNet-Lite0's weights: describe by it as well")
    parser.add_argument("--third-weights", type=Path, help="EfficientNet-Lite1's weights")
    parser.add_argument("--many", type=int, nargs="*", default=(), help="numbers of images, beside --n")
    parser.add_argument("--many-steps", type=int, default=10, help="steps of the ODE that draws them")
    options = parser.parse_args()
    if (options.third_weights or options.many) and not options.second_weights:
        parser.error("--third-weights and --many need --second-weights")
    description = Description(
        encoder=options.encoder, weights=options.weights, token=options.token, device=options.device
    )
    found = rows(
        options.run, options.out, options.n, options.steps, options.precision, description, options.data,
        options.other_reference, options.other_encoders,
    )  # fmt: skip
    print(lines(found))
    reference = RunFolder(options.run).read_config().config.store
    weights: dict[Size, Path] = {"lite0": options.second_weights} if options.second_weights else {}
    weights |= {"lite1": options.third_weights} if options.third_weights else {}
    if weights:
        print(f"\n{lines(as_networks(options.out / 'images-0', reference, options.out, weights, options.device))}")
    if options.many:
        base = GenerateConfig(
            run=options.run,
            steps=options.many_steps,
            **{**BASE, "precision": options.precision, "device": options.device},
        )
        numbers = (options.n, *options.many)
        print(f"\n{lines(of_many(base, reference, options.out, weights['lite0'], options.device, numbers))}")


if __name__ == "__main__":
    main()
