"""`python -m trainer score RUN`: from a run to its numbers in one command.

    images      what is missing of them is drawn (`generate`)
    numbers     RUN/samples-…-evaluation/ENCODER.json, and a line of the run's record (`evaluate`)
    page        RUN/report.html

What it lacks, the extractor's weights or the reference, is said before anything is drawn. Each part goes on from where
it was stopped, and what is done is done once: a second call only prints. It is done when the result at hand is of these
images, this extractor, this reference and this version of the metrics, and stands in the run's record.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.roots import absolute
from trainer.evaluation.generate.generate import generate
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.generate.noted import read_noted
from trainer.evaluation.generate.plan import plan
from trainer.evaluation.options import GenerateConfig, ScoreConfig
from trainer.evaluation.quality.card import DRAWN, Card
from trainer.evaluation.quality.evaluate import Description, evaluate, read_record, record, require_ready
from trainer.evaluation.quality.measures import VERSION, table
from trainer.evaluation.quality.result_files import result_file
from trainer.ranks.world import device_named
from trainer.run.folder import RunFolder

UNKNOWN_SIDE = 256  # of an image of imported latents that do not say it
FIX = "remove the file; it is made again"


def score(config: ScoreConfig) -> list[str]:
    """Do what is missing; returns what to print, on the main rank. Raises UserError."""
    is_main = os.environ.get("RANK", "0") == "0"
    drawing = _drawing(config)
    planned = plan(drawing, device_named(config.device))
    folder = planned.folder
    reference = config.reference or planned.run.config.store
    description = Description(encoder=config.encoder, weights=config.weights, token=config.token, device=config.device)
    result = result_file(folder.with_name(f"{folder.name}-evaluation"), description.label)
    n_there = n_written(folder) if folder.is_dir() else 0
    if n_there > config.n:
        raise UserError(
            f"{folder} holds {n_there:,} images, more than --n {config.n:,}; score these with --n {n_there}, or others "
            "in another --out"
        )
    done = _result_at(result) if n_there == config.n else None  # every rank sees the same, none having written yet
    found = done if done is not None and _is_of(done, folder, config, reference) else None
    if is_main and found is None:
        side = planned.run.data.latent_identity.resolution or UNKNOWN_SIDE
        require_ready(
            reference, description, images=folder, side=side, n_reference=config.n_reference, run=config.run,
            cache=config.cache,
        )  # fmt: skip
    if found is None:
        generate(drawing)
    if not is_main:
        return []
    run = RunFolder(config.run)
    if found is None:
        found = evaluate(
            folder, reference, description, n_reference=config.n_reference, run=config.run, cache=config.cache,
            resamples=config.resamples,
        )  # fmt: skip
    elif not any(line.card == _card(found) for line in read_record(config.run)):  # a kill came between the two
        record(config.run, _card(found).step, found)
    if config.report and _is_older(run.report, run.evaluations):
        from trainer.evaluation.report.page import write_report

        write_report([config.run], run.report, "")
    return _lines(found, result, run.report if config.report else None)


def _drawing(config: ScoreConfig) -> GenerateConfig:
    names = GenerateConfig.__dataclass_fields__
    return GenerateConfig(**{name: getattr(config, name) for name in names})


def _result_at(path: Path) -> dict[str, Any] | None:
    """A result that was written before; None where there is none that can be read."""
    try:
        return parse_json(dict[str, Any], read_regular(path), str(path), FIX)
    except FileNotFoundError:
        return None


def _card(result: dict[str, Any]) -> Card:
    return parse_json(Card, json.dumps(result.get("card", {})), "the card of a result", FIX)


def _is_of(result: dict[str, Any], folder: Path, config: ScoreConfig, reference: Path | str) -> bool:
    """Whether a result is what this command would measure."""
    card, noted = _card(result), read_noted(folder)
    drawn_alike = all(getattr(card, name) == getattr(noted, name) for name in (*DRAWN, "checkpoint_sha256", "protocol"))
    asked = {"reference": absolute(reference), "n_reference": config.n_reference}
    measured_alike = card.n_images == config.n and card.metrics_version == VERSION
    return drawn_alike and measured_alike and result.get("asked") == asked


def _is_older(page: Path, data: Path) -> bool:
    return not page.exists() or page.stat().st_mtime_ns < data.stat().st_mtime_ns


def _lines(result: dict[str, Any], file: Path, page: Path | None) -> list[str]:
    """For a person."""
    card = _card(result)
    lines = [table(result)]
    if card.protocol and card.departures:
        lines += [f"not as {card.protocol} was published:", *(f"  {each}" for each in card.departures)]
    elif card.protocol:
        lines.append(f"as {card.protocol} was published, in all that its card knows")
    return [*lines, f"card: {file}", *([f"page: {page}"] if page else [])]
