"""What the driver of stage one costs a unit, with everybody else infinitely fast.

    .venv/bin/python -m benchmarks.driver            # --help

`pipeline.job._Driver` runs as it is, on a stand-in for Ray whose tasks and calls are done as soon as they are asked
for: what is measured is the driver's own bookkeeping, and no Ray. Refs come back in the order of `ray.wait`'s argument,
decodes before encodes, so that decoded units queue up before encoders that have no room, as they do where encoding
holds the run back. `--real` adds a run on a cluster of this machine with decoders and encoders that do nothing: there
Ray's own cost of two calls a unit comes in.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, machine, table
from pipeline.cluster.environment import prepare_ray
from pipeline.cluster.resources import Resources
from pipeline.config import PrecomputeConfig
from storage import StoreLayout
from storage.index import make_index

# (units, encoders, decoders): this machine, a node of 8 GPUs, 16 of them
CASES = ((2_500, 1, 1), (20_000, 1, 1), (100_000, 1, 1), (20_000, 8, 120), (20_000, 128, 1920), (100_000, 128, 1920))


class StandIn:
    """The part of Ray that the driver asks for; every ref is ready, its value made when it is asked for."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def remote(self, **options: Any) -> Any:
        two = options.get("num_returns") == 2

        def call(*arguments: Any) -> Any:
            refs = next(self._numbers), ("decode" if two else "encode", next(self._numbers))
            return refs if two else refs[1]

        return lambda function: SimpleNamespace(remote=call)

    def wait(
        self, refs: list[Any], *, num_returns: int, timeout: float, fetch_local: bool = True
    ) -> tuple[list[Any], Any]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Any) -> Any:
        values = {"decode": ([], {"read": 0.0, "decode": 0.0, "crop": 0.0}, None), "encode": 0.0, "shares": {}}
        return values[ref[0]]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1e6}

    available_resources = cluster_resources

    def kill(self, actor: Any, no_restart: bool = True) -> None:
        pass

    def actor(self) -> Any:
        method = self.remote()(None)
        shares = SimpleNamespace(remote=lambda: ("shares", next(self._numbers)))
        return SimpleNamespace(ready=method, encode_and_publish=method, shares=shares)


def plan_of(n_units: int) -> Any:
    """A plan of units of one row in no store."""
    keys = [f"{row:08d}" for row in range(n_units)]
    index = make_index(keys, [0] * n_units, [""] * n_units, keys, [0] * n_units)
    layout = StoreLayout(n_rows=n_units, views=("original",), resolution=8, shard_rows=1)
    missing = dict.fromkeys(range(n_units), ("features/f",))
    return SimpleNamespace(
        index=index, layout=layout, missing=missing, redo={}, n_images_missing=n_units, failed_before=0, root=None
    )


def alone(n_units: int, n_encoders: int, n_decoders: int, limit_s: float) -> tuple[int, float]:
    """(units driven, seconds), the driver alone, cut short after the limit."""
    from pipeline import encoder_pool, job

    ray = StandIn()
    job.ray = encoder_pool.ray = ray  # type: ignore[assignment]
    config = PrecomputeConfig(data="nowhere", store="nowhere", resolution=8, shard_rows=1)
    resources = Resources(
        encoders=n_encoders,
        encoder_cpus=1,
        encoder_gpus=1,
        decoders=n_decoders,
        decode_cpus=1,
        window=n_decoders + 2 * n_encoders,
        store_bytes=2**30,
    )
    pool = encoder_pool.EncoderPool(ray.actor, n_encoders, 3600.0)
    driver = job._Driver(config, plan_of(n_units), None, resources, pool, job.Stop())  # type: ignore[arg-type]
    start_s = time.perf_counter()
    with cut_short(driver, start_s + limit_s), quiet():
        driver.run()
    return driver.meter.n_units, time.perf_counter() - start_s


@contextlib.contextmanager
def cut_short(driver: Any, until_s: float) -> Iterator[None]:
    """End the driver's loop when it is time."""
    look = driver._look_at_cluster

    def look_and_stop() -> None:
        look()
        if time.perf_counter() > until_s:
            raise KeyboardInterrupt

    driver._look_at_cluster = look_and_stop
    with contextlib.suppress(KeyboardInterrupt):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The progress bar goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


class NoSource:
    """Samples that are no images: what decodes costs nothing."""

    def read_many(self, locations: Sequence[str]) -> Iterator[np.ndarray]:
        yield from (np.zeros((8, 8, 3), np.uint8) for _ in locations)


class NoEncoder:
    """An encoding actor that does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def ready(self) -> str:
        return "none"

    def shares(self) -> dict[int, float]:
        return {}

    def encode_and_publish(self, images: np.ndarray, block: Any, sent_unix_s: float) -> float:
        return 0.0


def on_ray(n_units: int, n_encoders: int) -> tuple[int, float]:
    """(units, seconds) on a cluster of this machine, of as many CPUs as it takes."""
    import ray

    from pipeline import job

    plan = plan_of(n_units)
    plan.root, plan.groups, plan.digests = "nowhere", (), {}
    config = PrecomputeConfig(data="nowhere", store="nowhere", resolution=8, shard_rows=1, encoders=n_encoders)
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=2 * n_encoders + 2, include_dashboard=False)
    try:
        with quiet(), contextlib.redirect_stdout(sys.stderr):
            outcome = job.run_on_cluster(config, plan, NoSource(), "run", encoder=NoEncoder)  # type: ignore[arg-type]
    finally:
        ray.shutdown()
    return n_units, outcome.seconds


def row(what: str, n_units: int, n_encoders: int, n_decoders: int, driven: int, seconds: float) -> list[str]:
    counts = [n_units, n_encoders, n_decoders, driven, round(driven / seconds)]
    return [what, *(f"{count:,}" for count in counts), f"{1e3 * seconds / max(1, driven):.3f}"]


def main() -> None:
    """Print the table and write `driver.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-s", type=float, default=60.0, help="cut a case short after so long (default 60)")
    parser.add_argument("--real", type=int, default=0, metavar="UNITS", help="so many units on Ray as well")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "driver.md", help="(default benchmarks/results/driver.md)"
    )
    args = parser.parse_args()
    prepare_ray("")
    header = ["what", "units", "encoders", "decoders", "units driven", "units/s", "ms a unit"]
    rows = []
    if args.real:
        n_units, seconds = on_ray(args.real, 2)
        rows.append(row("with Ray", n_units, 2, 2, n_units, seconds))
    for n_units, n_encoders, n_decoders in CASES:
        driven, seconds = alone(n_units, n_encoders, n_decoders, args.limit_s)
        rows.append(row("driver alone", n_units, n_encoders, n_decoders, driven, seconds))
        print(*rows[-1], sep="  ", flush=True)
    said = machine(args.out.parent, ("ray",))
    args.out.write_text(f"# The driver of stage one\n\n{said}\n\n{table(header, rows)}\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
