"""`python -m trainer score RUN`: from a run to its numbers in one command.

    images      what is missing of them is drawn (`generate`)
    numbers     RUN/samples-…-evaluation/ENCODER.json, and a line of the run's record (`evaluate`)
    page        RUN/report.html

What it lacks, an extractor's weights or the reference, is said before anything is drawn. Each part goes on from where
it was stopped, and what is done is done once, of FDr⁶ in each of its six spaces: a second call only prints. It is done
when the result at hand is of these images, this extractor with these weights, this reference as it is now, this number
of draws and this version of the metrics (`quality/asked.py`), and stands in the run's record.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.base.waiting import waiting
from trainer.evaluation.generate.generate import generate
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.generate.noted import read_noted
from trainer.evaluation.generate.plan import plan
from trainer.evaluation.options import GenerateConfig, ScoreConfig
from trainer.evaluation.quality import spaces
from trainer.evaluation.quality.asked import asked_for, is_what_was_asked
from trainer.evaluation.quality.card import DRAWN, card_in
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate, require_ready, statistics_sha256
from trainer.evaluation.quality.measures import VERSION, table
from trainer.evaluation.quality.record import read_record, record
from trainer.evaluation.quality.reference import contents
from trainer.evaluation.quality.result_files import result_file
from trainer.ranks.world import device_named
from trainer.run.folder import RunFolder

UNKNOWN_SIDE = 256  # of an image of imported latents that do not say it
FIX = "remove the file; it is made again"


def score(config: ScoreConfig) -> list[str]:
    """Do what is missing; returns what to print, on the main rank. Raises UserError."""
    is_main = os.environ.get("RANK", "0") == "0"
    drawing = _drawing(config)
    with waiting("opening the run, reading its checkpoint", hidden=not is_main):
        planned = plan(drawing, device_named(config.device))
    folder = planned.folder
    reference = config.reference or planned.run.config.store
    description = Description(encoder=config.encoder, weights=config.weights, token=config.token, device=config.device)
    is_of_spaces = config.encoder == spaces.NAME
    described = spaces.described_in(description) if is_of_spaces else {description.label: description}
    results = folder.with_name(f"{folder.name}-evaluation")
    result = result_file(results, spaces.NAME if is_of_spaces else description.label)
    n_there = n_written(folder) if folder.is_dir() else 0
    if n_there > config.n:
        raise UserError(
            f"{folder} holds {n_there:,} images, more than --n {config.n:,}; score these with --n {n_there}, or others "
            "in another --out"
        )
    # Every rank sees the same, none having written yet.
    with waiting("looking whether the result is of what lies there", hidden=not is_main):
        found = _done(result, folder, config, reference) if n_there == config.n else None
    if is_main and found is None:
        if config.held_out is not None:
            contents(config.held_out)
        side = planned.run.data.latent_identity.resolution or UNKNOWN_SIDE
        for name, how in described.items():
            against = spaces.reference_of(reference, name) if is_of_spaces else reference
            if n_there == config.n and _done(result_file(results, name), folder, config, against) is not None:
                continue
            with waiting(f"looking whether {name} can describe"):
                require_ready(
                    against, how, images=folder, side=side, n_reference=config.n_reference, run=config.run,
                    cache=config.cache,
                )  # fmt: skip
    if found is None:
        generate(drawing)
    if not is_main:
        return []
    run = RunFolder(config.run)
    options: dict[str, Any] = {"n_reference": config.n_reference, "run": config.run, "cache": config.cache}
    options["resamples"] = config.resamples
    if found is not None:
        _record_once(config.run, found)
    elif is_of_spaces:

        def measured(images: Path, against: Path | str, how: Description, **options: Any) -> dict[str, Any]:
            before = _done(result_file(results, how.label), images, config, against)
            if before is None:
                return evaluate(images, against, how, **options)
            _record_once(config.run, before)
            return before

        found = spaces.evaluate_spaces(
            folder, reference, description, held_out=config.held_out, measured=measured, **options
        )
    else:
        found = evaluate(folder, reference, description, **options)
    if config.report and _is_older(run.report, run.evaluations):
        from trainer.evaluation.report.page import write_report

        with waiting("drawing the page"):
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


def _done(path: Path, folder: Path, config: ScoreConfig, reference: Path | str) -> dict[str, Any] | None:
    """The result at `path` where it is what this command would measure."""
    result = _result_at(path)
    return result if result is not None and _is_of(result, folder, config, reference) else None


def _record_once(run: Path, result: dict[str, Any]) -> None:
    """Add a result to a run's record that a kill left out of it."""
    card = card_in(result)
    if not any(line.card == card for line in read_record(run)):
        record(run, card.step, result)


def _is_of(result: dict[str, Any], folder: Path, config: ScoreConfig, reference: Path | str) -> bool:
    """Whether a result is what this command would measure."""
    card, noted = card_in(result), read_noted(folder)
    drawn_alike = all(getattr(card, name) == getattr(noted, name) for name in (*DRAWN, "checkpoint_sha256", "protocol"))
    if not drawn_alike or card.n_images != config.n or card.metrics_version != VERSION:
        return False
    is_of_spaces = result.get("name") == spaces.NAME
    if is_of_spaces and card.divisors is None:  # of before its card had them
        return False
    now = asked_for(
        reference,
        config.weights,
        n_reference=config.n_reference,
        resamples=config.resamples,
        held_out=config.held_out if is_of_spaces else None,
    )

    def statistics() -> str | None:
        return None if is_of_spaces else statistics_sha256(reference, str(result.get("name")))

    return is_what_was_asked(result.get("asked") or {}, now, card, config.weights, statistics)


def _is_older(page: Path, data: Path) -> bool:
    return not page.exists() or page.stat().st_mtime_ns < data.stat().st_mtime_ns


def _lines(result: dict[str, Any], file: Path, page: Path | None) -> list[str]:
    """For a person."""
    card = card_in(result)
    lines = [spaces.table(result) if result["name"] == spaces.NAME else table(result)]
    if card.protocol and card.departures:
        lines += [f"not as {card.protocol} was published:", *(f"  {each}" for each in card.departures)]
    elif card.protocol:
        lines.append(f"as {card.protocol} was published, in every setting of the card (decoder and reference by name)")
    return [*lines, f"card: {file}", *([f"page: {page}"] if page else [])]
