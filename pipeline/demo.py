"""The demo: both stages on the built-in photographs, then pictures and a table. A few CPU minutes, no network.

Stage two runs as commands of its own, as a user would type them: nothing of the trainer is imported here.
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
from storage.console import EXIT_FAILED, EXIT_OK

RESOLUTION, SHARD_ROWS = 128, 128
PRESET = "sit-tiny-2"


def demo_config(out: Path) -> PrecomputeConfig:
    """Stage one on the built-in photographs below `out`, with the built-in encoders."""
    photos = out / "photographs"
    n_images = write_photos(photos)
    print(f"{n_images} crops of the built-in photographs in {photos}")
    return PrecomputeConfig(
        data=str(photos),
        store=str(out / "store"),
        latents="tiny-vae",
        features="tiny-vit",
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
    run = out / "run"
    train = ["train", "--store", stage_one.store, "--preset", PRESET, "--run", str(run)]
    _trainer([*train, *(["--steps", str(steps)] if steps is not None else [])])
    stage_two = json.loads((run / "summary.json").read_text())
    pictures = [picture.path for picture in write_preview(stage_one.store, out)]
    samples = out / "samples.png"
    _trainer(["sample", "--run", str(run), "--out", str(samples), "--n", "32"])
    print(report(stage_one, stage_two, [*pictures, samples], time.perf_counter() - start_s))
    return EXIT_OK


def report(stage_one: Summary, stage_two: dict[str, Any], pictures: list[Path], seconds: float) -> str:
    """The table that the demo ends with."""
    encoded = f"{stage_one.images_per_s} img/s" if stage_one.units_encoded else "reused, nothing encoded"
    trained = f"{stage_two['steps_per_s']} steps/s" if stage_two["steps_now"] else "complete before, nothing trained"
    first, last = stage_two["first"], stage_two["last"]
    rows = [
        ("images", f"{stage_one.images} ({stage_one.images_failed} failed)"),
        ("units", f"{stage_one.units} ({stage_one.units_encoded} encoded now)"),
        ("precompute", encoded),
        *((f"bytes an image, {path}", str(n)) for path, n in stage_one.bytes_per_image.items()),
        ("training", f"{trained}, {stage_two['steps']} steps, {stage_two['parameters'] / 1e6:.1f} M parameters"),
        *(
            (f"{name.replace('_', ' ')}, first → last", f"{first[name]:.4f} → {last[name]:.4f}")
            for name in ("velocity_loss", "alignment_loss")
        ),
        ("seconds in all", f"{seconds:.0f}"),
        ("store", stage_one.store),
        ("checkpoint", stage_two["checkpoint"]),
        *((path.name, str(path)) for path in pictures),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _trainer(arguments: list[str]) -> None:
    """Run a trainer command; ends the demo with its status when it fails, having said why itself."""
    status = subprocess.run([sys.executable, "-m", "trainer", *arguments]).returncode
    if status:
        sys.exit(status)
