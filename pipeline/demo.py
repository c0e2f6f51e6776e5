"""The demo: both stages on the built-in photographs, with alignment and without, and a page that shows them together.

Stage two runs as commands of its own, as a user would type them: nothing of the trainer is imported here. A few
CPU minutes, no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import PrecomputeConfig
from pipeline.precompute import Summary, precompute
from pipeline.preview import write_preview
from pipeline.sources.photos import write_photos
from storage.base.console import EXIT_FAILED, EXIT_OK

RESOLUTION, SHARD_ROWS = 128, 128
FEATURES = "tiny-vit"
PRESET, STEPS = "sit-tiny-2", 500
RUNS = {"repa": ["--data.features", FEATURES], "vanilla": ["--loss.projection-weight", "0"]}
IMAGES, MEASURED = 64, 512
PAGE = "report.html"


def demo_config(out: Path) -> PrecomputeConfig:
    """Stage one on the built-in photographs below `out`, with the built-in encoders."""
    photos = out / "photographs"
    n_images = write_photos(photos)
    print(f"{n_images} crops of the built-in photographs in {photos}")
    return PrecomputeConfig(
        data=str(photos),
        store=str(out / "store"),
        latents="tiny-vae",
        features=FEATURES,
        resolution=RESOLUTION,
        shard_rows=SHARD_ROWS,
        ray_address=os.environ.get("RAY_ADDRESS", ""),
    )


def run_demo(out: Path, *, steps: int | None = None) -> int:
    """Run everything below `out`; returns the exit status. What is there already is reused, and said so."""
    start_s = time.perf_counter()
    stage_one = precompute(demo_config(out))
    if stage_one.units_given_up:
        return EXIT_FAILED
    if stage_one.units_encoded == 0:
        print(f"the stores in {stage_one.store} are complete and were reused; nothing was encoded")
    pictures = [picture.path for picture in write_preview(stage_one.store, out)]
    for name, options in RUNS.items():
        run = str(out / name)
        train = ["train", "--store", stage_one.store, "--preset", PRESET, "--run", run]
        _trainer([*train, "--steps", str(STEPS if steps is None else steps), *options])
        _trainer(["generate", run, "--n", str(IMAGES)])
        _trainer(["cknna", run, "--features", FEATURES, "--n", str(MEASURED)])
    page = out / PAGE
    title = "REPA and vanilla on the built-in photographs"
    _trainer(["report", *(str(out / name) for name in RUNS), "--out", str(page), "--title", title])
    print(report(stage_one, out, [*pictures, page], time.perf_counter() - start_s))
    return EXIT_OK


def report(stage_one: Summary, out: Path, pictures: list[Path], seconds: float) -> str:
    """The table that the demo ends with."""
    encoded = f"{stage_one.images_per_s} img/s" if stage_one.units_encoded else "reused, nothing encoded"
    rows = [
        ("images", f"{stage_one.images} ({stage_one.images_failed} failed)"),
        ("units", f"{stage_one.units} ({stage_one.units_encoded} encoded now)"),
        ("precompute", encoded),
        *((f"bytes an image, {path}", str(n)) for path, n in stage_one.bytes_per_image.items()),
    ]
    for name in RUNS:
        rows += _training_rows(name, json.loads((out / name / "summary.json").read_text()))
    rows += [("seconds in all", f"{seconds:.0f}"), ("store", stage_one.store)]
    rows += [(path.name, str(path)) for path in pictures]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _training_rows(name: str, summary: dict[str, Any]) -> list[tuple[str, str]]:
    trained = f"{summary['steps_per_s']} steps/s" if summary["steps_now"] else "complete before, nothing trained"
    first, last = summary["first"], summary["last"]
    losses = ["denoising_loss"] + ["alignment_loss"] * (last["alignment_loss"] != 0)
    return [
        (name, f"{trained}, {summary['steps']} steps, {summary['parameters'] / 1e6:.1f} M parameters"),
        *((f"{name}, {loss.replace('_', ' ')}", f"{first[loss]:.4f} → {last[loss]:.4f}") for loss in losses),
        (f"{name}, checkpoint", summary["checkpoint"]),
    ]


def _trainer(arguments: list[str]) -> None:
    """Run a trainer command; ends the demo with its status when it fails, having said why itself."""
    status = subprocess.run([sys.executable, "-m", "trainer", *arguments]).returncode
    if status:
        sys.exit(status)
