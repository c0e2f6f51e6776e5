"""FDr⁶ (Yang et al., arXiv 2604.28190): the Fréchet distance in six spaces, each over that of held-out real images.

    FDr⁶ = 1/6 Σ_s FD_s(generated, reference) / FD_s(held-out, reference)

over Inception, ConvNeXt V2-B, DINOv2-L, MAE-L, SigLIP 2-so400m and CLIP-L. A value of 1 is as near to the reference as
held-out images are. The published divisors are those of ImageNet's 50,000 validation images against its training set
at 256 px, and hold for that reference alone; for another, name the `held_out` images, and they are measured.

Two of the published divisors have one digit (MAE's 0.04), so that the mean is known to some 5 % at best.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.base.choices import FDR6, INCEPTION
from storage.base.errors import UserError
from storage.base.files import write_atomic
from trainer.evaluation.quality.asked import asked_for
from trainer.evaluation.quality.card import SPACES
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.quality.intervals import RESAMPLES
from trainer.evaluation.quality.record import record
from trainer.evaluation.quality.reference import is_named_for
from trainer.evaluation.quality.result_files import folder_of, result_file
from trainer.evaluation.quality.six_spaces import (
    PUBLISHED_OF,
    bias_of_spaces,
    card_of_spaces,
    distance_of,
    interval_of_spaces,
    warnings_of_spaces,
)

NAME = SPACES
PUBLISHED = {  # the paper's evaluation, appendix B; release: eval_all_fds.py, scripts/README.md
    INCEPTION: 1.68,  # against ADM's statistics
    "fdr-convnext": 56.87,
    "fdr-dinov2": 14.19,
    "fdr-mae": 0.04,
    "fdr-siglip": 0.60,
    "fdr-clip": 5.60,
}
assert set(PUBLISHED) == {INCEPTION, *FDR6}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A distance, that of held-out images, and what the one is of the other."""

    fd: float
    held_out: float

    @property
    def ratio(self) -> float:
        """FDr."""
        return self.fd / self.held_out


def mean_ratio(ratios: dict[str, Ratio]) -> float:
    """FDr⁶ of the six spaces. Raises UserError where one is missing, or a divisor is not positive."""
    missing = sorted(set(PUBLISHED) - set(ratios))
    if missing:
        raise UserError(f"{NAME} is the mean over six spaces, and {', '.join(missing)} are missing")
    bad = sorted(name for name, each in ratios.items() if not each.held_out > 0)
    if bad:
        raise UserError(f"held-out images are at distance 0 in {', '.join(bad)}; name other images than the reference")
    return sum(each.ratio for each in ratios.values()) / len(ratios)


def described_in(description: Description) -> dict[str, Description]:
    """How images are described in each of the six spaces. Raises UserError."""
    if description.weights is not None:
        raise UserError(f"--encoder {NAME} is of six networks; leave --weights out, and have theirs in the caches")
    return {name: replace(description, encoder=name, token="cls") for name in PUBLISHED}


def evaluate_spaces(
    images: Path, reference: Path | str, description: Description, *, held_out: Path | None = None,
    out: Path | None = None, run: Path | None = None, step: int | None = None,
    measured: Callable[..., dict[str, Any]] = evaluate, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure in all six spaces, and write OUT/fdr6.json beside the six results. Raises UserError.

    A reference that is a folder of statistics has a file named for each space, NAME-fdr-clip.npz say. `measured` is
    called as `evaluate` is, for the images of each space.
    """
    described = described_in(description)
    folder = folder_of(images, out)
    of_measure = {name: options.get(name, default) for name, default in (("n_reference", 0), ("resamples", RESAMPLES))}
    asked = asked_for(reference, None, held_out=held_out, **of_measure)
    against = {name: reference_of(reference, name) for name in PUBLISHED}
    results, divisors, held_digests = {}, dict(PUBLISHED), set[str | None]()
    for name, how in described.items():
        results[name] = measured(images, against[name], how, out=folder, run=run, step=step, **options)
        if held_out is not None:
            held = evaluate(held_out, against[name], how, out=folder / "held-out", **options | {"resamples": 0})
            divisors[name] = float(distance_of(held)["value"])
            held_digests.add(held["generated"].get("digest"))
    ratios = {
        name: Ratio(fd=float(distance_of(result)["value"]), held_out=divisors[name]) for name, result in results.items()
    }
    mean = mean_ratio(ratios)
    divisors_of = PUBLISHED_OF if held_out is None else held_digests.pop() if len(held_digests) == 1 else None
    card = card_of_spaces(results, divisors, divisors_of, reference)
    first, fid = results[INCEPTION], results[INCEPTION]["metrics"]["fid"]
    counts = {name: fid[name] for name in ("n_generated", "n_reference")}
    result = {
        **first,
        "name": NAME,
        "encoder": {"name": NAME, "weights_sha256": card.extractor_sha256, "held_out": str(held_out or PUBLISHED_OF)},
        "metrics": {NAME: {"value": mean, **counts, **interval_of_spaces(results, divisors)}},
        "bias": bias_of_spaces(results, divisors),
        "asked": asked,
        "spaces": {name: {"fd": r.fd, "held_out": r.held_out, "fdr": r.ratio} for name, r in ratios.items()},
        "card": card.plain(),
        "warnings": warnings_of_spaces(results, divisors_of),
    }
    write_atomic(result_file(folder, NAME), json.dumps(result, indent=1).encode(), "evaluate")
    if run is not None:
        record(run, card.step, result)
    return result


def reference_of(reference: Path | str, name: str) -> Path | str:
    """The file of a folder of statistics that is named for a space; the reference itself where it is no such folder."""
    if not isinstance(reference, Path) or not reference.is_dir():
        return reference
    files = [file for file in sorted(reference.glob("*.npz")) if is_named_for(file, name)]
    if not files:
        return reference
    if len(files) > 1:
        raise UserError(f"{reference} has {len(files)} files of {name} ({files[0].name}, {files[1].name}); keep one")
    return files[0]


def table(result: dict[str, Any]) -> str:
    """The six distances and their mean, for a person."""
    rows = [("space", "FD", "held-out", "FDr")]
    rows += [
        (name, f"{each['fd']:.4f}", f"{each['held_out']:.4f}", f"{each['fdr']:.4f}")
        for name, each in result["spaces"].items()
    ]
    metric = result["metrics"][NAME]
    rows.append(("FDr⁶", "", "", f"{metric['value']:.4f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{a:<{width}}  {b:>10}  {c:>10}  {d:>10}" for a, b, c, d in rows]
    if ends := metric.get("interval"):
        lines.append(f"FDr⁶ is {ends[0]:.4f} to {ends[1]:.4f} (95 %, of the choice of generated images alone)")
    if found := result["bias"].get(NAME):
        sizes = ", ".join(f"{value:.4f} of {n:,}" for n, value in zip(found["sizes"], found["values"], strict=True))
        lines.append(f"FDr⁶_inf is {found['infinity']:.4f} (line in 1/N through {sizes})")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
