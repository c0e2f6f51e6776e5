"""`python -m pipeline precompute` in one process and without Ray: for a machine with a GPU where none is installed.

    python -m benchmarks.without_ray precompute --data … --store … [options of `python -m pipeline precompute`]

Listing, plan, encoders, publishing and what is said of failures are stage one's own; only Ray's part is replaced.
Units are decoded ahead of their turn, then encoded and published one by one. One that cannot be read ends the run,
after which the same command goes on. Options that are about Ray are refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from itertools import islice

import numpy as np

from pipeline.cluster.resources import cores
from pipeline.commands import report_precompute
from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.encode import Block, UnitEncoder
from pipeline.failures import refuse_too_many
from pipeline.outcome import Outcome, Run
from pipeline.plan import Plan
from pipeline.sources import Source
from storage.base.commands import Command, run_one
from storage.base.console import Stop, progress_bar, run_program
from storage.base.errors import UserError

PROG = "python -m benchmarks.without_ray"
COMMANDS = {
    "precompute": Command(
        "encode every image of a data set into a feature store; run it again to go on",
        "pipeline.config:PrecomputeConfig",
        "benchmarks.without_ray:precompute",
    )
}
OF_RAY = ("ray_address", "encoders", "encoder_cpus", "decode_cpus", "unit_timeout_s", "dry_run", "verbose")
AHEAD = 4  # units decoded before their turn; 100 MB each at 256 px


def precompute(config: PrecomputeConfig) -> int:
    """Make the store that the configuration asks for, or finish it; returns the exit status. Raises UserError."""
    defaults = {each.name: each.default for each in fields(config)}
    if given := [name for name in OF_RAY if getattr(config, name) != defaults[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: of Ray, which is not used here; leave it out")
    return report_precompute(config, here)


def here(config: PrecomputeConfig, plan: Plan) -> AbstractContextManager[Run]:
    """This process, in place of a cluster."""
    return nullcontext(run_here)


def run_here(
    config: PrecomputeConfig,
    plan: Plan,
    source: Source,
    run_id: str,
    *,
    make_store: Callable[[], None],
    stop: Stop,
    encoder: type[UnitEncoder] = UnitEncoder,
) -> Outcome:
    """`pipeline.job.run_on_cluster` in this process. Raises what decoding raises, too."""
    start_s = time.perf_counter()
    n_threads = max(1, cores() // 2)  # as on Ray without a GPU, so that sums are rounded alike; the others decode
    models = encoder(plan.root, plan.groups, plan.digests, config.batch, n_threads, run_id)
    device = models.ready()
    make_store()
    n_failed, encoding_s = plan.failed_before, 0.0
    with progress_bar(plan.n_images_missing, unit="img", description="precompute") as bar:
        for images, block in decoded(config, plan, source):
            if stop.signal is not None:
                raise KeyboardInterrupt
            encoding_s += models.encode_and_publish(images, block, time.time())
            n_failed += len(block.failures)
            refuse_too_many(n_failed, len(plan.index), config.max_failures, plan.root)
            bar.update(len(images))
    seconds = time.perf_counter() - start_s
    return Outcome(
        n_images=plan.n_images_missing, n_failed=n_failed, seconds=seconds, given_up={}, device=device,
        encoder_busy=encoding_s / seconds, bound="", store_peak_bytes=0,
    )  # fmt: skip


def decoded(config: PrecomputeConfig, plan: Plan, source: Source) -> Iterator[tuple[np.ndarray, Block]]:
    """`decoded_unit` of every missing unit, in order, some ahead."""
    units = iter(plan.missing)
    decode = partial(decoded_unit, plan, source, config.resolution)
    ahead: deque[Future[tuple[np.ndarray, Block]]] = deque()
    pool = ThreadPoolExecutor(min(AHEAD, cores()))
    try:
        while True:
            ahead.extend(pool.submit(decode, unit) for unit in islice(units, AHEAD - len(ahead)))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def decoded_unit(plan: Plan, source: Source, resolution: int, unit: int) -> tuple[np.ndarray, Block]:
    """A unit's images uint8 (n, H, W, 3), and what goes with them to the encoder."""
    rows = plan.layout.unit_rows(unit)
    samples = plan.index.slice(rows)
    images, (failures, timings_s, crcs) = decode_unit(source, rows.start, samples.keys, samples.locations, resolution)
    paths, redo = plan.missing[unit], plan.redo.get(unit, ())
    return images, Block(unit=unit, failures=failures, timings_s=timings_s, paths=paths, crcs=crcs, redo=redo)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return run_one(PROG, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run_program(main, PROG)
