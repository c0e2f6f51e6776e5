"""The demo: both stages on digits over photographs, with alignment and without, measured and shown side by side.

    OUT/digits, heldout      the images, written here; OUT/store  what stage one makes of the first
    OUT/repa, vanilla        the runs, equal but for the alignment; what they said while they ran is in their .log
    OUT/report.html          the page

Stage two runs as commands of its own, as a user would type them: nothing of the trainer is imported here. Images are
described by `glyph-namer`, with which neither run was aligned. Five minutes on two cores, no network.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import FeaturesConfig, PrecomputeConfig
from pipeline.precompute import Summary, precompute
from pipeline.preview import write_preview
from pipeline.side_by_side import side_by_side
from pipeline.sources.glyphs import CLASSES, RESOLUTION, write_glyphs
from storage.base.console import EXIT_FAILED, EXIT_OK, say
from storage.base.ending import command, say_next
from storage.base.waiting import waiting
from storage.feature_file import FEATURES as FEATURES_ARRAY
from storage.feature_file import open_feature_file

N_PER_CLASS, N_HELDOUT_PER_CLASS = 200, 40
SHARD_ROWS = 256
FEATURES, JUDGE = "glyph-vit", "glyph-namer"
PRESET, STEPS = "sit-tiny-2", 600
TRAINING = ["--batch", "64", "--optim.decay", "cosine", "--optim.decay-until"]
RUNS = {"repa": ["--data.features", FEATURES], "vanilla": ["--loss.projection-weight", "0"]}
IMAGES, SAMPLING_STEPS, PROBED = 120, 25, 1000
PAGE = "report.html"


def demo_config(out: Path) -> PrecomputeConfig:
    """Stage one on the digits below `out`, with the built-in encoders."""
    images = out / "digits"
    with waiting("drawing digits over photographs"):
        n_images = write_glyphs(images, n_per_class=N_PER_CLASS)
    print(f"{n_images} digits over the built-in photographs in {images}")
    return PrecomputeConfig(
        data=str(images),
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
    steps = STEPS if steps is None else steps
    stage_one = precompute(demo_config(out))
    if stage_one.units_given_up:
        return EXIT_FAILED
    if stage_one.units_encoded == 0:
        print(f"the stores in {stage_one.store} are complete and were reused; nothing was encoded")
    pictures = [picture.path for picture in write_preview(stage_one.store, out)]
    say(f"stage one and its pictures took {time.perf_counter() - start_s:.0f} s")
    say(f"stage two: {steps} steps each, side by side; what the commands say is in {out}/*.log", flush=True)
    side_by_side({name: _chain(out / name, stage_one.store, steps) for name in RUNS}, out)
    named = evaluate_runs(out)
    runs = [str(out / name) for name in RUNS]
    analyse = ["analyse", *runs, "--times", "0.5", "--n", str(PROBED), "--out", str(out / "analysis")]
    title = "REPA and vanilla on digits over photographs"
    page = out / PAGE
    side_by_side({"page": [analyse, ["report", *runs, "--out", str(page), "--title", title]]}, out)
    say(*report(stage_one, out, named, [*pictures, page], time.perf_counter() - start_s).splitlines())
    first, second = (out / name for name in RUNS)
    say_next(
        command("trainer", "generate", first, "--n", "64", "--steps", str(SAMPLING_STEPS), "--guidance", "1.8"),
        command("trainer", "compare", first, second),
    )
    return EXIT_OK


def _chain(run: Path, store: str, steps: int) -> list[list[str]]:
    """The commands of one run."""
    train = ["train", "--store", store, "--preset", PRESET, "--run", str(run), "--steps", str(steps)]
    generate = ["generate", str(run), "--n", str(IMAGES), "--steps", str(SAMPLING_STEPS)]
    return [[*train, *TRAINING, str(steps), *RUNS[run.name]], generate]


def evaluate_runs(out: Path) -> dict[str, float]:
    """Measure each run's images against held-out originals; returns the share of them that a probe names as asked."""
    from pipeline.features import Job, write_features

    heldout = out / "heldout"
    with waiting("drawing held-out digits"):
        write_glyphs(heldout, n_per_class=N_HELDOUT_PER_CLASS, split="heldout")
    images = {name: _newest_images(out / name) for name in RUNS} | {"heldout": heldout}
    files = {name: out / "features" / f"{name}.npz" for name in images}
    jobs = [Job(where=where, out=files[name]) for name, where in images.items()]
    write_features(jobs, FeaturesConfig(encoder=JUDGE, token="mean", device="cpu"))
    reference = ["--reference", str(files["heldout"])]
    commands = {name: ["evaluate", str(files[name]), *reference, "--run", str(out / name)] for name in RUNS}
    side_by_side({f"{name}-evaluate": [command] for name, command in commands.items()}, out)
    return shares_named(files, images)


def shares_named(files: Mapping[str, Path], images: Mapping[str, Path]) -> dict[str, float]:
    """The share of each run's images that a logistic regression on held-out originals names as they were asked for."""
    with waiting("loading scikit-learn"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    originals = [path.parent.name for path in sorted(images["heldout"].glob("*/*.png"))]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    with waiting("fitting a probe that names digits"):
        probe.fit(open_feature_file(files["heldout"]).read(FEATURES_ARRAY), originals)
    shares = {}
    for name in RUNS:
        asked = [CLASSES[int(label)] for label in (images[name] / "labels.txt").read_text().split()]
        shares[name] = float(probe.score(open_feature_file(files[name]).read(FEATURES_ARRAY), asked))
    return shares


def _newest_images(run: Path) -> Path:
    """The folder that `generate` wrote last."""
    return max((file.parent for file in run.glob("samples-*/labels.txt")), key=lambda path: path.stat().st_mtime)


def report(stage_one: Summary, out: Path, named: Mapping[str, float], pages: list[Path], seconds: float) -> str:
    """The table that the demo ends with: what was made, then the runs side by side."""
    encoded = f"{stage_one.images_per_s} img/s" if stage_one.units_encoded else "reused, nothing encoded"
    rows = [
        ("images", f"{stage_one.images} ({stage_one.images_failed} failed)"),
        ("units", f"{stage_one.units} ({stage_one.units_encoded} encoded now)"),
        ("precompute", encoded),
        *((f"bytes an image, {path}", str(n)) for path, n in stage_one.bytes_per_image.items()),
        ("seconds in all", f"{seconds:.0f}"),
        ("store", stage_one.store),
        *((path.name, str(path)) for path in pages),
    ]
    columns = [_of_run(out / name, named[name]) for name in RUNS]
    compared = [("", *RUNS), *((title, *(column[title] for column in columns)) for title in columns[0])]
    width = max(len(name) for name, *_ in [*rows, *compared])
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", *(f"{title:<{width}}  " + "  ".join(f"{cell:>18}" for cell in cells) for title, *cells in compared)]
    return "\n" + "\n".join(lines)


def _of_run(run: Path, named: float) -> dict[str, str]:
    """A run's column."""
    summary = json.loads((run / "summary.json").read_text())
    first, last = summary["first"], summary["last"]
    evaluation = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    n_images = evaluation["metrics"]["fd"]["n_generated"]
    cells = {"steps": f"{summary['steps']:,}" if summary["steps_now"] else f"{summary['steps']:,} (before)"}
    for loss in ("denoising_loss", "alignment_loss"):
        shown = f"{first[loss]:.3f} → {last[loss]:.3f}" if last[loss] or loss == "denoising_loss" else "–"
        cells[loss.replace("_", " ")] = shown
    cells[f"Fréchet distance, {JUDGE}, {n_images} images"] = f"{evaluation['metrics']['fd']['value']:.3f}"
    cells["samples that a probe names as asked"] = f"{named:.0%}"
    for measure, title in (("probe", "linear probe of hidden states"), ("cknna", f"CKNNA with {FEATURES}")):
        points = json.loads((run / "analysis" / f"{measure}.json").read_text())["points"]
        best = max(points, key=lambda point: point[measure])
        value = f"{best[measure]:.1%}" if measure == "probe" else f"{best[measure]:.3f}"
        cells[f"{title}, best block"] = f"{value} (block {best['block']})"
    return cells
