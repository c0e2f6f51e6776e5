"""Stage one from end to end: list, plan, encode what is missing, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from pipeline.cluster.environment import prepare_ray
from pipeline.config import PrecomputeConfig
from pipeline.estimate import Estimate, estimate, said_before
from pipeline.failures import FAILURES_FILE, refuse_too_many, write_failures
from pipeline.outcome import Run
from pipeline.plan import Plan, create, describe_plan, make_plan, require_space
from pipeline.sources import open_source
from storage import Staging
from storage.base import ending
from storage.base.console import INTERRUPTS, say, stop_on_signals
from storage.base.shown import shown
from storage.base.waiting import waiting
from storage.layout import METADATA
from storage.roots import absolute, open_root
from storage.samples import REDO
from storage.staging import refuse_foreign

NOTHING = "none: everything was there"
DRY = "none: a dry run"
STOPPING = "stopping; what is published stays"
Where = Callable[[PrecomputeConfig, Plan], AbstractContextManager[Run]]


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
    failures: str  # the table of the failed images
    failures_mended: str  # what to do once they are mended; empty when none failed
    seconds: float
    images_per_s: float
    bytes_per_image: dict[str, int]
    device: str
    encoder_busy: float  # share of the time, towards the end
    bound: str  # the stage that held the run back
    object_store_peak_bytes: int
    estimate: Estimate | None = None  # of a dry run

    def table(self) -> str:
        """What the run did, in a few lines."""
        failed = f", {self.images_failed} failed (in {self.failures})" if self.images_failed else ", none failed"
        rows = {"images": f"{self.images}{failed}", "units": f"{self.units}, {self.units_encoded} encoded now"}
        if self.units_encoded:
            busy = f"encoders busy {self.encoder_busy:.0%}" + (f", {self.bound}" if self.bound else "")
            rows["speed"] = f"{self.images_per_s:g} images/s for {self.seconds:.0f} s on {self.device}; {busy}"
        sizes = ", ".join(f"{path} {n:,}" for path, n in self.bytes_per_image.items())
        rows |= {"bytes": f"an image: {sizes}", "store": self.store}
        if self.failures_mended:
            rows["failed"] = self.failures_mended
        return ending.rows(rows)


def on_ray(config: PrecomputeConfig, plan: Plan) -> AbstractContextManager[Run]:
    """A cluster to join or of this run's own, as the configuration says; how long it takes at least is said before."""
    address = prepare_ray(config.ray_address)
    with waiting("measuring what the time depends on"):
        time_said = said_before(plan, address)
    say(*time_said, flush=True)
    with waiting("loading Ray"):
        from pipeline.cluster.connection import ray_cluster  # imports Ray
        from pipeline.job import run_on_cluster

    @contextmanager
    def cluster() -> Iterator[Run]:
        with ray_cluster(address, verbose=config.verbose):
            yield run_on_cluster

    return cluster()


def precompute(config: PrecomputeConfig, where: Where = on_ray) -> Summary:
    """Make the store that the configuration asks for, or finish it; with `dry_run` say what that would be.

    Raises UserError for what the user can mend. Units that failed three times are in the summary; the others are done.
    `failures.parquet` is written however the run ends.
    """
    config = dataclasses.replace(config, data=absolute(config.data), store=absolute(config.store))
    source = open_source(config.data, config.source)
    say(f"listing {config.data} ({source.kind})", flush=True)  # minutes, for a million headers far away
    with waiting("finding its images and their labels"):
        listing = source.listing(config.labels)
    if listing.left_out:
        say(f"{len(listing.left_out)} files hold no image of this kind, such as {listing.left_out[0]}; left out")
    for warning in listing.warnings:
        say(f"warning: {warning}")
    root = open_root(config.store)
    refuse_foreign(root)
    with waiting("looking which units are there, and for the encoders' weights"):
        plan = make_plan(config, source, listing.index, root)
    say(*describe_plan(plan).splitlines(), flush=True)
    summary = Summary(
        store=config.store,
        images=len(plan.index),
        units=plan.layout.n_units,
        units_encoded=0,
        units_given_up={},
        images_encoded=0,
        images_failed=plan.failed_standing,
        failures=root.at(FAILURES_FILE),
        failures_mended=REDO if plan.failed_standing else "",
        seconds=0.0,
        images_per_s=0.0,
        bytes_per_image={group.layout.path: group.layout.sample_bytes for group in plan.groups},
        device=NOTHING,
        encoder_busy=0.0,
        bound="",
        object_store_peak_bytes=0,
    )
    require_space(plan)
    budget = partial(refuse_too_many, n_images=len(plan.index), share=config.max_failures, root=root)
    if config.dry_run:
        budget(plan.failed_standing)
        with waiting("measuring what the time depends on"):
            guessed = estimate(plan, source, config.ray_address)
        say(*guessed.lines)
        return dataclasses.replace(summary, device=DRY, estimate=guessed)
    groups = [*((group.layout, plan.digests[group.layout.path]) for group in plan.groups), *plan.others]
    if plan.failed_standing or not plan.missing:
        with Staging(root) as staging:
            create(plan, source, staging)
            n_failed, _ = write_failures(root, groups, plan.index, staging.run_id)  # a killed run has not
        summary = dataclasses.replace(summary, images_failed=n_failed, failures_mended=REDO if n_failed else "")
        budget(plan.failed_standing)
    if not plan.missing:
        return summary
    there = where(config, plan)
    n_failed = n_standing = plan.failed_standing
    # Nothing is made on disk before the cluster is there and an encoder has its weights. On Ctrl-C or SIGTERM the
    # cluster is left or stopped.
    with (
        stop_on_signals(*INTERRUPTS, answer=STOPPING) as stop,
        there as run,
        Staging(root) as staging,
    ):
        try:
            outcome = run(
                config, plan, source, staging.run_id, make_store=partial(create, plan, source, staging), stop=stop
            )
        finally:
            if METADATA in root.children(""):  # there is no store when no encoder came up
                n_failed, n_standing = write_failures(root, groups, plan.index, staging.run_id)
    for unit, history in outcome.given_up.items():
        print(shown(f"unit {unit} was given up after {len(history)} attempts: {'; '.join(history)}"), file=sys.stderr)
    budget(n_standing)
    return dataclasses.replace(
        summary,
        units_encoded=len(plan.missing) - len(outcome.given_up),
        units_given_up=outcome.given_up,
        images_encoded=outcome.n_images,
        images_failed=n_failed,
        failures_mended=REDO if n_failed else "",
        seconds=round(outcome.seconds, 2),
        images_per_s=round(outcome.n_images / outcome.seconds, 1) if outcome.seconds else 0.0,
        device=outcome.device,
        encoder_busy=round(outcome.encoder_busy, 3),
        bound=outcome.bound,
        object_store_peak_bytes=outcome.store_peak_bytes,
    )
