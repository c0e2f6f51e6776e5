"""Every metric that two feature files allow: its value, the counts it was made from, and how sure it is.

    fid, sfid (Inception) or fd         `frechet.py`
    inception_score                     `inception_score.py`
    kid (Inception) or kd               `kernels.py`: the same distance by the cubic kernel
    cmmd                                `kernels.py`, of CLIP's embeddings (the extractor cmmd-clip)
    precision, recall                   `precision_recall.py`
    density, coverage                   `density_coverage.py`

`interval` is the middle 95 % of draws of the images that `resampled` names (`intervals.py`); where that is "subsets",
it comes from the deviation of the subsets, s of m images, as s √(m / N): not below the truth, since the sets' whole
varies less than that.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from storage.base.choices import CMMD
from storage.base.shown import shown
from storage.base.waiting import waiting
from storage.feature_file import FEATURES, LOGITS, SPATIAL, FeatureFile
from trainer.evaluation.quality import density_coverage as balls
from trainer.evaluation.quality import precision_recall as shares
from trainer.evaluation.quality.frechet import Gaussian, frechet_distance, gaussian_of, influence
from trainer.evaluation.quality.inception_score import SPLIT, score_and_influence
from trainer.evaluation.quality.intervals import RESAMPLES, by_sample_size, interval_of
from trainer.evaluation.quality.kernels import Discrepancy, cmmd, kid

VERSION = 2  # of all of them: raised when a number changes
PUBLISHED_IMAGES = 50_000
NORMAL_95 = 1.959964
Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics and, where there are images, features."""

    pooled: Gaussian
    spatial: Gaussian | None
    features: FeatureFile | None
    statistics_given: bool
    record: dict[str, Any]


def measure(
    generated: FeatureFile, against: Reference, device: torch.device, resamples: int = RESAMPLES
) -> tuple[Metrics, dict[str, Any]]:
    """(name → value and counts, name → how a distance falls with the number of images where they are few)."""
    features = generated.read(FEATURES)
    n = len(features)
    n_real = against.features.images["n"] if against.features else None
    counts = {"n_generated": n, "n_reference": None if against.statistics_given else n_real}
    inception = LOGITS in generated.arrays
    metrics: Metrics = {}
    bias: dict[str, Any] = {}
    for name, x, other in (
        ("fid" if inception else "fd", features, against.pooled),
        ("sfid", generated.read(SPATIAL) if SPATIAL in generated.arrays else None, against.spatial),
    ):
        if x is None or other is None:
            continue
        with _waiting(name, n):
            own = gaussian_of(x)
            value = frechet_distance(own, other)
            metrics[name] = {"value": value, **counts}
        if resamples and n > x.shape[1]:
            with _waiting(name, n, "the interval of "):
                metrics[name] |= _interval(value, influence(x, own, other), "generated", resamples)
        if resamples and n < PUBLISHED_IMAGES:
            with _waiting(name, n, "fewer images for the bias of "):
                found = by_sample_size(x, other, value)
            if found:
                bias[name] = asdict(found)
    if inception:
        with _waiting("inception_score", n):
            value, added = score_and_influence(generated.read(LOGITS))
            metrics["inception_score"] = {"value": value, "n_generated": n, "split": SPLIT}
            metrics["inception_score"] |= _interval(value, added, "generated", resamples)
    if against.features is not None:
        real = against.features.read(FEATURES)
        counts = {"n_generated": n, "n_reference": len(real)}
        metrics |= _by_images(real, features, counts, device, resamples, generated.label, inception)
    return metrics, bias


def _by_images(
    real: np.ndarray, generated: np.ndarray, counts: dict[str, Any], device: torch.device, resamples: int, label: str,
    inception: bool,
) -> Metrics:  # fmt: skip
    """What needs the reference's images."""
    n = len(generated)
    metrics: Metrics = {}
    kernel = "kid" if inception else "kd"
    with _waiting(kernel, n):
        metrics[kernel] = _of_kernel(kid(real, generated, device=device), counts, resamples)
    if label == CMMD:
        with _waiting("cmmd", n):
            metrics["cmmd"] = _of_kernel(cmmd(real, generated, device=device), counts, resamples)
    with _waiting("precision and recall", n):
        found = shares.precision_recall(real, generated, device=device)
    each: dict[str, tuple[np.ndarray, str, int]] = {
        "precision": (found.generated_inside, "generated", shares.NEIGHBOURS),
        "recall": (found.real_inside, "reference", shares.NEIGHBOURS),
    }
    if min(len(real), len(generated)) > balls.NEIGHBOURS:
        with _waiting("density and coverage", n):
            covered = balls.density_coverage(real, generated, device=device)
        each["density"] = (covered.balls, "generated", balls.NEIGHBOURS)
        each["coverage"] = (covered.covered, "reference", balls.NEIGHBOURS)
    for name, (values, of, k) in each.items():
        mean = float(values.mean())
        with _waiting(name, n, "the interval of "):
            metrics[name] = {"value": mean, **counts, "k": k} | _interval(mean, values - mean, of, resamples)
    return metrics


def _waiting(name: str, n: int, part: str = "") -> AbstractContextManager[None]:
    """Says which metric is being computed: one of 2,048 features takes a minute on one core."""
    title = TITLES.get(name, "Fréchet distance" if name == "fd" else name.replace("_", " ")).partition(" ×")[0]
    return waiting(f"measuring {part}{title} of {n:,} images")


def _of_kernel(found: Discrepancy, counts: dict[str, Any], resamples: int) -> dict[str, Any]:
    metric: dict[str, Any] = {"value": found.value, **counts}
    if not found.subsets:
        return metric | _interval(found.value, found.influence, "generated", resamples)
    metric |= {"subsets": found.subsets, "subset_size": found.subset_size, "subset_deviation": found.deviation}
    deviation = found.deviation * math.sqrt(found.subset_size / min(counts["n_generated"], counts["n_reference"]))
    if resamples:
        ends = [found.value - NORMAL_95 * deviation, found.value + NORMAL_95 * deviation]
        metric |= {"interval": ends, "deviation": deviation, "resampled": "subsets"}
    return metric


def _interval(value: float, added: np.ndarray, of: str, resamples: int) -> dict[str, Any]:
    if not resamples or not np.any(added):  # all images alike, of which draws say nothing: no ball holds one, say
        return {}
    found = interval_of(value, added, resamples=resamples)
    return {
        "interval": [found.low, found.high],
        "deviation": found.deviation,
        "resampled": of,
        "resamples": found.resamples,
        "resampling_seed": found.seed,
    }


TITLES = {"fid": "FID", "sfid": "sFID", "kid": "KID × 1000", "kd": "kernel distance × 1000", "cmmd": "CMMD"}
IN_THOUSANDTHS = ("kid", "kd")  # as papers print them


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    titles = TITLES | {"fd": f"Fréchet distance ({shown(result['name'])})"}
    rows = []
    for name, metric in result["metrics"].items():
        counts = f"{metric['n_generated']:,} generated"
        if "n_reference" in metric:
            n_reference = metric["n_reference"]
            counts += ", given statistics" if n_reference is None else f", {n_reference:,} reference"
        scale = 1000 if name in IN_THOUSANDTHS else 1
        ends = metric.get("interval")
        interval = f"{ends[0] * scale:.4f} to {ends[1] * scale:.4f}" if ends else ""
        rows.append((titles.get(name, name.replace("_", " ")), f"{metric['value'] * scale:.4f}", interval, counts))
    for name, found in result.get("bias", {}).items():
        sizes = ", ".join(f"{value:.4f} of {n:,}" for n, value in zip(found["sizes"], found["values"], strict=True))
        rows.append((f"{titles[name]}_inf", f"{found['infinity']:.4f}", "", f"line in 1/N through {sizes}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{max(10, widths[1])}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]
    if widths[2]:
        lines.append("intervals: 95 %, of the choice of images alone")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
