"""What runs leave behind for the report, written without training."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from storage import open_store
from tests.stores import FEATURES, LATENTS
from trainer.config.command_line import train_config
from trainer.config.saved import to_yaml
from trainer.evaluation.generate.decode import write_grid
from trainer.evaluation.generate.image_files import LABELS_FILE, SETTINGS_FILE, image_path, write_image
from trainer.run.checkpoint import VERSION

STEPS, EVERY, BATCH, RATE = 300, 10, 8, 100.0
VOID = ("meta", "img", "line", "circle", "path", "wbr", "br")


def make_run(
    folder: Path, store: Path, seed: int, weight: float, *, measured: bool, name: str = "", device: str = "cpu"
) -> Path:
    """What a run of 300 steps leaves behind, without its weights."""
    run = folder / (name or f"run-{seed}")
    options = {"preset": "sit-tiny-2", "store": str(store), "run": str(run), "seed": str(seed), "steps": str(STEPS)}
    config = train_config({**options, "batch": str(BATCH), "loss.projection_weight": str(weight)})
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    lines = [
        {
            "step": step,
            "denoising_loss": 1 / (1 + step / 100) + 0.01 * seed - 0.02 * weight,
            "alignment_loss": -0.5 * step / STEPS if weight else 0.0,
            "images_per_s": RATE,
            "ranks": 2,
        }
        for step in range(EVERY, STEPS + 1, EVERY)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"device": device, "parameters": 1_234_567, "classes": 5, "version": "9.8.7", "machine": "a-machine"}
    (run / "summary.json").write_text(json.dumps({**summary, "commit": "c0ffee" * 6 + "abcd"}))
    opened = open_store(store)
    identities = {path: opened.group(path).identity_digest for path in (LATENTS, FEATURES)}
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    checkpoint.mkdir(parents=True)
    state: dict[str, Any] = {"version": VERSION, "step": STEPS, "config": {}, "identities": identities}
    state |= {"log_sums": [], "log_count": 0, "skipped": 0, "scaler": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (run / "latest").write_text(checkpoint.name)
    write_grid(np.full((8, 64, 64, 3), 25 * seed % 256, dtype=np.uint8), run / f"samples-{STEPS:07d}-ode50.png")
    if measured:
        (run / "analysis").mkdir()
        for measure in ("probe", "cknna"):
            points = [{"step": STEPS, "t": 0.5, "block": b, measure: 0.1 * b + 0.01 * seed} for b in (1, 2, 3, 4)]
            (run / "analysis" / f"{measure}.json").write_text(json.dumps({"points": points, **protocol(measure)}))
        evaluate(run, 30.0 - seed)
    return run


def protocol(measure: str, **changes: Any) -> dict[str, Any]:
    """How all are measured, as `sweep` records it."""
    features = {"path": FEATURES, "identity_digest": "f" * 64}
    fields = {"n": 1000, "k": 10, "c": 1.0, "seed": 0, "weights": "ema", "rows": "a" * 64, "depth": 4}
    return {"by": measure, "features": features, "store": "/stores/s", **fields, **changes}


def evaluation(value: float, **changes: Any) -> dict[str, Any]:
    """A line of a run's record."""
    counts = {"n_generated": 512, "n_reference": 1152}
    line = {"step": STEPS, "name": "inception", "encoder": {"name": "inception", "weights_sha256": "1"}}
    line |= {"generated": {"kind": "folder", "path": "/samples", "resolution": 0, "n": 512, "n_failed": 0}}
    line |= {"reference": {"kind": "folder", "path": "/reference", "digest": "d" * 64, "n": 1152, "n_failed": 0}}
    return {**line, "metrics": {"fid": {"value": value, **counts}}, **changes}


def evaluate(run: Path, *values: float, **changes: Any) -> None:
    """Write a run's record: a line a value."""
    lines = [json.dumps(evaluation(value, **changes)) + "\n" for value in values]
    (run / "evaluations.jsonl").write_text("".join(lines))


def draw(run: Path, n: int = 12, side: int = 32, labels: bool = True, **settings: Any) -> Path:
    """What `generate` leaves behind: images that differ, their classes in turn of five, the grid."""
    folder = run / f"samples-{STEPS:07d}-set"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(run.name))
    images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    for i, pixels in enumerate(images):
        write_image(image_path(folder, i), pixels)
    recipe = {"step": STEPS, "seed": 0, "sample.sampler": "ode", "sample.steps": 50, "sample.guidance": 1.5}
    of_run = {"weights_sha256": run.name, "card": {"version": 1, "run": str(run), "checkpoint_sha256": run.name}}
    (folder / SETTINGS_FILE).write_text(json.dumps({**recipe, **of_run, **settings}))
    if labels:
        (folder / LABELS_FILE).write_text("".join(f"{i % 5}\n" for i in range(n)))
    write_grid(images, folder.with_name(f"{folder.name}.png"))
    return folder


class Structure(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to and says."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "action", "data", "srcset", "poster", "xlink:href")
        self.references += [value or "" for name, value in attrs if name in names]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def structure(html: str) -> Structure:
    """A page, which must be whole."""
    found = Structure()
    found.feed(html)
    assert not found.open
    return found


def parsed(report: Path) -> Structure:
    """A written page."""
    return structure(report.read_text(encoding="utf-8"))


def plain(html: str) -> str:
    """A page without the places at which words may be broken."""
    return html.replace("<wbr>", "")
