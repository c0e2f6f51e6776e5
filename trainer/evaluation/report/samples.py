"""Samples of every method, the same image numbers side by side, with their classes and real images of these above.

Image i of two runs has the same noise and the same class where both were drawn by the same settings, so what differs
between them is the model. Of a run's sets, the one is shown that most runs have. A run without a set of images shows
the grid that training drew. Real images are read by a command of the pipeline's, in a process of its own, from the
source of the store; where they cannot be had the page says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from storage import StoreError, UserError, open_store
from storage.base.ending import command as command_line
from storage.base.shown import LONGEST
from trainer.evaluation.generate.image_files import Drawn, image_path, read_image
from trainer.evaluation.report.charts import escaped
from trainer.evaluation.report.methods import Method
from trainer.evaluation.report.pictures import encoded, spread_over
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import breakable

MOST_IMAGES = 8
IMAGE_SIDE, GRID_SIDE, STORE_SIDE = 256, 1024, 1024
REAL_S = 120.0  # after which the page goes on without real images
PREVIEWS = ("*reconstruction.png", "*features.png")  # what `python -m pipeline preview` writes
MOST_PREVIEWS = 6


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of images uint8 (H, W, 3) with what stands below each, and the whole set; `note` says what they are."""

    title: str
    note: str
    images: list[np.ndarray] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    whole: np.ndarray | None = None
    whole_title: str = ""


def samples(records: Sequence[RunRecord], methods: Sequence[Method], *, real: bool = True) -> str:
    """HTML of the section; where there are several methods, a run of each that has images stands for all its seeds."""
    shown = [records[_first_with_images(records, method)] for method in methods] if len(methods) > 1 else list(records)
    others = len(records) - len(shown)
    records = shown
    chosen = [_choose(record, _usual_recipe(records)) for record in records]
    labels = next((found for drawn in chosen if drawn is not None and (found := drawn.labels()) is not None), None)
    least = min((drawn.n for drawn in chosen if drawn is not None), default=0)
    numbers = spread_over(labels, least, MOST_IMAGES)
    names, n_rows_of, store = _classes(records)
    strips = [_strip(record, drawn, numbers, names) for record, drawn in zip(records, chosen, strict=True)]
    if not any(strip.images or strip.whole is not None for strip in strips) and not any(strip.note for strip in strips):
        line = command_line("trainer", "generate", "RUN", "--n", "64")
        return f"<p>No run has drawn images yet: <code>{line}</code></p>"
    if real and labels is not None and store and any(strip.images for strip in strips):
        strips.insert(0, _real(store, [labels[i] for i in numbers], names, n_rows_of))
    none = [strip.title for strip in strips if not strip.images and strip.whole is None and not strip.note]
    without = f" No images yet: {', '.join(none)}." if none else ""
    without += f" One run of each method is shown; {others} of other seeds are not." if others else ""
    return _shown([strip for strip in strips if strip.title not in none], _alike(chosen) + without)


def _first_with_images(records: Sequence[RunRecord], method: Method) -> int:
    return next((i for i in method.runs if records[i].drawn), method.runs[0])


def _usual_recipe(records: Sequence[RunRecord]) -> str:
    """The settings by which most runs have images; of several, those of the newest set."""
    counts = Counter(recipe for record in records for recipe in {drawn.recipe for drawn in record.drawn})
    newest = {drawn.recipe: place for record in records for place, drawn in enumerate(record.drawn)}
    return max(counts, key=lambda recipe: (counts[recipe], newest[recipe]), default="")


def _choose(record: RunRecord, usual: str) -> Drawn | None:
    alike = [drawn for drawn in record.drawn if drawn.recipe == usual]
    sets = alike or record.drawn
    return sets[-1] if sets else None


def _alike(chosen: Sequence[Drawn | None]) -> str:
    recipes = {drawn.recipe for drawn in chosen if drawn is not None}
    n = sum(drawn is not None for drawn in chosen)
    if n < 2:
        return "Click on an image to see it large; “all” shows the whole set."
    same = "The same place has the same noise and class in every run"
    if len(recipes) > 1:
        same = "Not every run was drawn by the same settings, so places need not have the same noise and class"
    return f"{same}. Click on an image to see it large; “all” shows the whole set."


def _classes(records: Sequence[RunRecord]) -> tuple[dict[int, str], dict[int, list[int]], str]:
    """Names of the classes, the first rows of each, and the store they are of; empty where it is gone."""
    for record in records:
        try:
            store = open_store(record.config.store)
            labels, names = store.index.labels, dict(store.index.class_names.occurring)
        except (StoreError, UserError, OSError):
            continue
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], sorted(names))
        rows = {
            label: order[start : start + MOST_IMAGES].tolist()
            for label, start in zip(sorted(names), starts, strict=True)
        }
        return names, rows, record.config.store
    return {}, {}, ""


def _class_name(label: int, names: dict[int, str]) -> str:
    return names.get(label) or f"class {label}"


def _strip(record: RunRecord, drawn: Drawn | None, numbers: Sequence[int], names: dict[int, str]) -> Strip:
    """A run's images; raises nothing for pictures that are damaged."""
    try:
        if drawn is None:
            return _preview(record)
        labels = drawn.labels()
        paths = [image_path(drawn.folder, i) for i in numbers]
        images = [read_image(path) for path in paths]
        grid = drawn.folder.with_name(f"{drawn.folder.name}.png")
        whole = read_image(grid) if grid.is_file() else None
    except (UserError, OSError) as error:
        return Strip(title=record.name, note=f"not shown: {' '.join(str(error).split())[: 2 * LONGEST]}")
    captions = ["" if labels is None else _class_name(labels[i], names) for i in numbers]
    return Strip(
        title=record.name,
        note=_in_words(drawn.settings),
        images=images,
        captions=captions,
        whole=whole,
        whole_title=f"{record.name}: the first {min(drawn.n, 64)} images",
    )


def _preview(record: RunRecord) -> Strip:
    if record.picture is None:
        return Strip(title=record.name, note="")
    sample = record.config.sample
    settings = {
        "sample.sampler": sample.sampler, "sample.heun": sample.heun, "sample.steps": sample.steps,
        "sample.guidance": sample.guidance,
    }  # fmt: skip
    words = "drawn from it" if record.picture.parent == record.path else f"while it trained, {_in_words(settings)}"
    note = f"{words} ({record.picture.name})"
    return Strip(title=record.name, note=note, whole=read_image(record.picture), whole_title=record.name)


def _in_words(settings: Mapping[str, Any]) -> str:
    """How images were drawn."""
    step, steps, guidance = settings.get("step"), settings.get("sample.steps"), settings.get("sample.guidance")
    parts = [f"after {step:,} steps" if isinstance(step, int) else ""]
    if settings.get("sample.sampler") and isinstance(steps, int):
        heun = " (Heun)" if settings.get("sample.heun") else ""
        parts.append(f"{settings['sample.sampler']}{heun} in {steps} steps")
    if isinstance(guidance, int | float):
        away = " away from a weaker model" if settings.get("weaker_sha256") else ""
        parts.append("no guidance" if guidance == 1 else f"guidance {guidance:g}{away}")
    parts.append(f"noise of seed {settings['seed']}" if "seed" in settings else "")
    return ", ".join(filter(None, map(str, parts)))


def _real(store: str, labels: Sequence[int], names: dict[int, str], rows_of: dict[int, list[int]]) -> Strip:
    """Real images of classes, another one for each time that a class is there."""
    rows = []
    for place, label in enumerate(labels):
        of_class = rows_of.get(label, [])
        rows.append(of_class[list(labels[:place]).count(label) % len(of_class)] if of_class else None)
    title = "Real images"
    wanted = sorted({row for row in rows if row is not None})
    if not wanted:
        return Strip(title=title, note="the store has none of these classes")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipeline", "originals", store, "--rows", *map(str, wanted), "--out", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=REAL_S)
        except (OSError, subprocess.SubprocessError) as error:
            return Strip(title=title, note=f"not shown: {type(error).__name__}")
        found = {row: path for row in wanted if (path := Path(folder) / f"{row}.png").is_file()}
        if not found:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return Strip(
                title=title, note=f"not shown: {lines[-1] if lines else 'their source gave none'}"[: 3 * LONGEST]
            )
        pictures = {row: read_image(path) for row, path in found.items()}
    blank = np.full_like(next(iter(pictures.values())), 128)
    images = [pictures.get(row, blank) if row is not None else blank for row in rows]
    captions = [_class_name(label, names) for label in labels]
    return Strip(title=title, note="of the same classes, from the store's source", images=images, captions=captions)


def _shown(strips: Sequence[Strip], note: str) -> str:
    """HTML of strips, all pictures encoded together."""
    pixels: dict[str, np.ndarray] = {}
    most: dict[str, int] = {}
    for s, strip in enumerate(strips):
        for i, image in enumerate(strip.images):
            pixels[f"{s}-{i}"], most[f"{s}-{i}"] = image, IMAGE_SIDE
        if strip.whole is not None:
            pixels[f"{s}-all"], most[f"{s}-all"] = strip.whole, GRID_SIDE
    uris = encoded(pixels, most)
    parts = [f"<p>{escaped(note)}</p>", '<div class="strips">']
    for s, strip in enumerate(strips):
        whole = uris.get(f"{s}-all")
        parts.append(f'<section class="strip-row"><h3>{breakable(strip.title)}<small>{escaped(strip.note)}</small>')
        if whole and strip.images:
            name = f"{strip.whole_title}"
            parts.append(
                f'<button type="button" class="all" data-title="{escaped(name)}">all'
                f'<img src="{whole}" alt="{escaped(name)}" hidden></button>'
            )
        parts.append("</h3>")
        if strip.images:
            parts.append('<div class="images">')
            for i, caption in enumerate(strip.captions):
                what = f"{strip.title}: {caption}" if caption else f"{strip.title}, image {i + 1}"
                parts.append(
                    f'<figure class="sample"><button type="button" data-title="{escaped(what)}">'
                    f'<img src="{uris[f"{s}-{i}"]}" alt="{escaped(what)}"></button>'
                    f"<figcaption>{escaped(caption)}</figcaption></figure>"
                )
            parts.append("</div>")
        elif whole:
            parts.append(
                f'<button type="button" class="whole" data-title="{escaped(strip.whole_title)}">'
                f'<img src="{whole}" alt="Images drawn from {escaped(strip.title)}"></button>'
            )
        parts.append("</section>")
    return "".join([*parts, "</div>"])


# ---- pictures of the store --------------------------------------------------------------------------------------


def previews(records: Sequence[RunRecord], beside: Path | None) -> list[Path]:
    """What `python -m pipeline preview` wrote beside the store, the runs or the page."""
    folders = [] if beside is None else [beside]
    for record in records:
        folders += [record.path.absolute().parent]
        if record.config.store and "://" not in record.config.store:
            folders += [Path(record.config.store), Path(record.config.store).absolute().parent]
    found = {path.resolve(): path for folder in folders for name in PREVIEWS for path in sorted(folder.glob(name))}
    return [path for path in found.values() if path.is_file()][:MOST_PREVIEWS]


def store_pictures(records: Sequence[RunRecord], beside: Path | None) -> str:
    """HTML of these, with what they show in words; nothing where there are none."""
    pixels = {}
    for path in previews(records, beside):
        try:
            pixels[str(path)] = read_image(path)
        except (UserError, OSError):  # a picture of another's
            continue
    uris = encoded(pixels, dict.fromkeys(pixels, STORE_SIDE))
    parts = []
    for name, uri in uris.items():
        what, path = "Images, and what the stored latents decode to", Path(name)
        if path.name.endswith("features.png"):
            what = "Images, and their stored patch tokens: the first three principal components as colours"
        parts.append(
            f'<figure><button type="button" class="whole" data-title="{escaped(what)}"><img src="{uri}" alt="{what}">'
            f"</button><figcaption>{what}<small>{escaped(str(path))}</small></figcaption></figure>"
        )
    return f'<div class="wide-cards">{"".join(parts)}</div>' if parts else ""
