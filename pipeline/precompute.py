"""Stage one from end to end: list, plan, encode what is missing, report."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

from pipeline.config import PrecomputeConfig
from pipeline.plan import describe_plan, make_plan
from pipeline.ray_environment import prepare_ray
from pipeline.sources import open_source
from storage import Staging
from storage.roots import absolute


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, and what the store holds now."""

    store: str
    images: int
    units: int
    units_encoded: int
    units_given_up: dict[int, list[str]]
    images_encoded: int
    images_failed: int
    seconds: float
    images_per_s: float
    bytes_per_image: dict[str, int]
    device: str


def precompute(config: PrecomputeConfig) -> Summary:
    """Make the store that the configuration asks for, or finish it.

    Raises UserError for what the user can mend. Units that failed three times are in the summary; the others are done.
    """
    config = dataclasses.replace(config, data=absolute(config.data), store=absolute(config.store))
    source = open_source(config.data, config.source)
    print(f"listing {config.data} ({source.kind})", flush=True)  # minutes, for a million headers far away
    found = source.listing()
    if found.left_out:
        print(f"{len(found.left_out)} files hold no image of this kind, such as {found.left_out[0]}; left out")
    for warning in found.warnings:
        print(f"warning: {warning}")
    with Staging(config.store) as staging:
        plan = make_plan(config, source, found.index, staging)
        print(describe_plan(plan), flush=True)
        n_encoded, n_failed, seconds, device = 0, plan.failed_before, 0.0, "none: everything was there"
        given_up: dict[int, list[str]] = {}
        if plan.missing:
            prepare_ray(config.ray_address)
            from pipeline.job import run  # imports Ray

            outcome = run(config, plan, source, staging.run_id)
            n_encoded, n_failed, seconds = outcome.n_images, outcome.n_failed, outcome.seconds
            given_up, device = outcome.given_up, outcome.device
    for unit, history in given_up.items():
        print(f"unit {unit} was given up after {len(history)} attempts: {'; '.join(history)}", file=sys.stderr)
    return Summary(
        store=config.store,
        images=len(plan.index),
        units=plan.layout.n_units,
        units_encoded=len(plan.missing) - len(given_up),
        units_given_up=given_up,
        images_encoded=n_encoded,
        images_failed=n_failed,
        seconds=round(seconds, 2),
        images_per_s=round(n_encoded / seconds, 1) if seconds else 0.0,
        bytes_per_image={group.layout.path: group.layout.sample_bytes for group in plan.groups},
        device=device,
    )
