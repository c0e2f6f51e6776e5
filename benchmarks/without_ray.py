"""`python -m pipeline precompute` in one process and without Ray: for a machine with a GPU that has none.

    python -m benchmarks.without_ray precompute --data … --store … [options of `python -m pipeline precompute`]

Plan, encoders and publishing are stage one's own, so the store is the one that it makes. A unit that cannot be read
ends the run; the same command goes on.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.encode import Block, UnitEncoder
from pipeline.failures import refuse_too_many, write_failures
from pipeline.plan import Plan, create, describe_plan, make_plan
from pipeline.sources import Source, open_source
from storage import Staging
from storage.base.commands import Command, run_one
from storage.base.console import progress_bar, run_program, say
from storage.roots import absolute, open_root

PROG = "python -m benchmarks.without_ray"
COMMANDS = {
    "precompute": Command(
        "encode every image of a data set into a feature store; run it again to go on",
        "pipeline.config:PrecomputeConfig",
        "benchmarks.without_ray:precompute",
    )
}
AHEAD = 4  # units decoded before their turn; 100 MB each at 256 px


def precompute(config: PrecomputeConfig) -> None:
    """Make the store that the configuration asks for, or finish it. Raises UserError."""
    config = dataclasses.replace(config, data=absolute(config.data), store=absolute(config.store))
    source = open_source(config.data, config.source)
    root = open_root(config.store)
    plan = make_plan(config, source, source.listing(config.labels).index, root)
    say(*describe_plan(plan).splitlines(), flush=True)
    with Staging(root) as staging:
        n_threads = torch.get_num_threads()
        encoder = UnitEncoder(root, plan.groups, plan.digests, config.batch, n_threads, staging.run_id)
        encoder.ready()  # without weights there is no store
        create(plan, source, staging)
        n_failed = plan.failed_before
        with progress_bar(plan.n_images_missing, unit="img", description="precompute") as bar:
            for images, block in decoded(config, plan, source):
                encoder.encode_and_publish(images, block, time.time())
                n_failed += len(block.failures)
                refuse_too_many(n_failed, len(plan.index), config.max_failures, root)
                bar.update(len(images))
        groups = [(group.layout, plan.digests[group.layout.path]) for group in plan.groups]
        n_failed, _ = write_failures(root, groups, plan.index, staging.run_id)
    say(f"{config.store}: {len(plan.index)} images, {n_failed} failed")


def decoded(config: PrecomputeConfig, plan: Plan, source: Source) -> Iterator[tuple[np.ndarray, Block]]:
    """`decoded_unit` of every missing unit, in order, some ahead."""
    units = iter(plan.missing)
    waiting: deque[Future[tuple[np.ndarray, Block]]] = deque()
    with ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1)) as pool:
        while True:
            for unit in islice(units, AHEAD - len(waiting)):
                waiting.append(pool.submit(decoded_unit, plan, source, config.resolution, unit))
            if not waiting:
                return
            yield waiting.popleft().result()


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
