"""`python -m trainer evaluate`: FID, sFID, Inception Score, precision and recall; or a Fréchet distance in any encoder.

The trainer loads no encoder: images are described by `python -m pipeline features`, in a process of its own, into a
feature file beside the result, and described once. What is computed here is arithmetic on two sets of vectors. Every
number is published with the counts it was made from, and with a warning when they are not those of published figures:
a Fréchet distance falls with the number of images (its bias is about 1/N), so only equal counts compare.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.errors import UserError
from storage.feature_file import FEATURES, LOGITS, SPATIAL, FeatureFile, open_feature_file
from storage.files import write_atomic
from storage.roots import absolute
from trainer.checkpoint import latest_checkpoint, read_state
from trainer.distributed import device_named
from trainer.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from trainer.evaluation.image_files import step_drawn_at
from trainer.evaluation.inception_score import SPLIT, inception_score
from trainer.evaluation.precision_recall import NEIGHBOURS, precision_recall
from trainer.evaluation.reference import contents, read_statistics

PUBLISHED_IMAGES = 50_000
INCEPTION = "inception"
RUN_RECORD = "evaluations.jsonl"


@dataclass(frozen=True, kw_only=True)
class Description:
    """How images are described: the options of `python -m pipeline features`."""

    encoder: str
    weights: Path | None = None
    token: str = "cls"
    resolution: int = 0
    device: str = "auto"

    @property
    def label(self) -> str:
        """As `FeatureFile.label`."""
        return f"{self.encoder}-mean" if self.token == "mean" and self.encoder != INCEPTION else self.encoder

    def describe(self, images: Path | str, out: Path, limit: int = 0) -> FeatureFile:
        """Run the command; ends with its status when it fails, having said why itself."""
        command = [sys.executable, "-m", "pipeline", "features", str(images), "--out", str(out)]
        command += ["--encoder", self.encoder, "--token", self.token, "--device", self.device]
        command += ["--resolution", str(self.resolution), "--n", str(limit)]
        if self.weights is not None:
            command += ["--weights", str(self.weights)]
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)
        return open_feature_file(out)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics and, where there are images, features."""

    pooled: Gaussian
    spatial: Gaussian | None
    features: FeatureFile | None
    statistics_given: bool


def evaluate(
    images: Path,
    reference: Path | str,
    description: Description,
    *,
    out: Path | None = None,
    n_reference: int = 0,
    run: Path | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Measure, write OUT/ENCODER.json (and a line of the run's record), and return what is in it. Raises UserError.

    A reference that is no path is the URL of a store.
    """
    device = device_named(description.device)
    there = contents(images)  # both are looked at before anything is described
    contents(reference)
    described = Path(open_feature_file(images).images["path"]) if there.features else images
    step = _step(run, step, described)
    name = images.name if images.is_dir() else images.stem
    folder = out or images.absolute().with_name(f"{name}-evaluation")
    if there.features:
        generated = open_feature_file(images)
    elif there.images:
        generated = description.describe(images, folder / f"generated-{description.label}.npz")
    else:
        raise UserError(f"{images} holds statistics only; name the generated images, or their feature file")
    against = _open_reference(reference, generated, description, folder, n_reference)
    result: dict[str, Any] = {
        "name": generated.label,
        "encoder": generated.identity,
        "generated": generated.images,
        "reference": against.features.images if against.features else {"path": absolute(reference)},
        "metrics": measure(generated, against, device),
        "warnings": _warnings(generated, against),
    }
    write_atomic(folder / f"{generated.label}.json", json.dumps(result, indent=1).encode(), "evaluate")
    if run is not None:
        with open(run / RUN_RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **result}) + "\n")
    return result


def measure(generated: FeatureFile, against: Reference, device: torch.device) -> dict[str, dict[str, Any]]:
    """Every metric that the files allow: name → value and the counts it was made from."""
    features = generated.read(FEATURES)
    n, n_real = len(features), against.features.images["n"] if against.features else None
    statistics_n = None if against.statistics_given else n_real
    inception = LOGITS in generated.arrays
    distance = frechet_distance(gaussian_of(features), against.pooled)
    metrics = {"fid" if inception else "fd": {"value": distance, "n_generated": n, "n_reference": statistics_n}}
    if SPATIAL in generated.arrays and against.spatial is not None:
        distance = frechet_distance(gaussian_of(generated.read(SPATIAL)), against.spatial)
        metrics["sfid"] = {"value": distance, "n_generated": n, "n_reference": statistics_n}
    if inception:
        score = inception_score(generated.read(LOGITS))
        metrics["inception_score"] = {"value": score, "n_generated": n, "split": SPLIT}
    if against.features is not None:
        shares = precision_recall(against.features.read(FEATURES), features, device=device)
        for name in ("precision", "recall"):
            metrics[name] = {
                "value": getattr(shares, name),
                "n_generated": n,
                "n_reference": n_real,
                "k": NEIGHBOURS,
            }
    return metrics


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    titles = {"fid": "FID", "sfid": "sFID", "fd": f"Fréchet distance ({result['name']})"}
    rows = []
    for name, metric in result["metrics"].items():
        counts = f"{metric['n_generated']:,} generated"
        if "n_reference" in metric:
            n_reference = metric["n_reference"]
            counts += ", given statistics" if n_reference is None else f", {n_reference:,} reference"
        rows.append((titles.get(name, name.replace("_", " ")), f"{metric['value']:.4f}", counts))
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{title:<{width}}  {value:>10}  {counts}" for title, value, counts in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])


def read_record(run: Path) -> list[dict[str, Any]]:
    """What was measured of a run, oldest first; a line that a crash cut short is left out."""
    path = run / RUN_RECORD
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _step(run: Path | None, step: int | None, images: Path) -> int | None:
    """The step of the run that the images are of: as said, else as `generate` noted it, else the newest."""
    if run is None:
        if step is not None:
            raise UserError("--step says which step of --run the images are of; pass --run RUN as well")
        return None
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {run} is not a run (it has no config.yaml); name a folder that `make train` wrote")
    if step is None:
        step = step_drawn_at(images)
    if step is not None:
        return step
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint, so the step of these images is unknown; mend --run or pass --step")
    return read_state(checkpoint).step


def _open_reference(
    where: Path | str, generated: FeatureFile, description: Description, folder: Path, limit: int
) -> Reference:
    there = contents(where)
    features: FeatureFile | None = None
    if there.features:
        features = open_feature_file(Path(where))
    elif there.images:
        if generated.label != description.label:
            raise UserError(
                f"{generated.path} is of {generated.label}, the reference would be of {description.label}; pass "
                f"--encoder {generated.identity['name']} --token {generated.identity['vector']}"
            )
        features = description.describe(where, folder / f"reference-{description.label}.npz", limit)
    if features is not None and features.identity != generated.identity:
        differing = sorted(
            key
            for key in {*features.identity, *generated.identity}
            if features.identity.get(key) != generated.identity.get(key)
        )
        shown = "; ".join(f"{key}: {generated.identity.get(key)} and {features.identity.get(key)}" for key in differing)
        raise UserError(f"generated images and reference are described differently ({shown}); describe both alike")
    if there.statistics and generated.label == INCEPTION:
        pooled, spatial = read_statistics(Path(where))
        return Reference(pooled=pooled, spatial=spatial, features=features, statistics_given=True)
    if features is None:
        raise UserError(
            f"{where} holds Inception's statistics and no images; {generated.label} needs them, or a feature file"
        )
    return Reference(
        pooled=gaussian_of(features.read(FEATURES)),
        spatial=gaussian_of(features.read(SPATIAL)) if SPATIAL in features.arrays else None,
        features=features,
        statistics_given=False,
    )


def _warnings(generated: FeatureFile, against: Reference) -> list[str]:
    n, width = generated.images["n"], len(against.pooled.mean)
    found = []
    if n != PUBLISHED_IMAGES:
        found.append(f"{n:,} images; published figures are of {PUBLISHED_IMAGES:,}, and fewer give larger distances")
    if n <= width:
        found.append(f"{n:,} images do not determine the covariance of {width:,} features; compare equal counts only")
    if generated.label == INCEPTION and not generated.identity["published_weights"]:
        found.append("Inception's weights are not the published ones; no number here compares with any other")
    if against.features is None:
        found.append("the reference has no images, so there is no precision and no recall")
    return found
