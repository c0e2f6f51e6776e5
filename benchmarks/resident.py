"""The loader with data in memory, alone: `--data.resident ram` beside batches that are in place, and beside the store.

    python -m benchmarks.resident [--rows 2048] [--batch 256] [--seconds 4] [--step-ms 100] [--rounds 3] [--threads 2]

A store of 410 kB a row (256 × 768 float16 features, 16 kB moments), shuffled batches to the CPU. Variants:

    in place     the loader hands out buffers that were filled once, and gathers nothing
    plain array  no loader: `np.take` out of an ordinary array into a buffer, by as many threads
    ram          `--data.resident ram`
    store        the store, from a warm page cache

Each runs in a process of its own: a few batches without being timed, then --seconds with a model that does nothing,
then as long with one that sleeps for --step-ms, as the host does while a GPU is at work. Rounds go through all variants
in turn; medians over rounds, and of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestants import SPECS, ours
from benchmarks.report import RESULTS, machine, table

VARIANTS = ("in place", "plain array", "ram", "store")
WARM_UP = 5
PREFETCH = 3


@contextmanager
def batches(variant: str, data: Any, batch: int, threads: int) -> Iterator[Iterator[Any]]:
    """Endless batches."""
    import torch

    from trainer.config.data import DataConfig
    from trainer.data.loader import Loader
    from trainer.data.resident import open_rows
    from trainer.ranks.world import World

    cpu = torch.device("cpu")
    config = DataConfig(resident="stream" if variant == "store" else "ram", threads=threads)
    rows = open_rows(data, config, World(rank=0, size=1, device=cpu), with_targets=True)
    if variant == "in place":
        rows.gather = lambda visit, buffers: None  # type: ignore[method-assign]
    with closing(rows):
        if variant == "plain array":
            copies = {name: array.numpy().copy() for name, array in rows._arrays.items()}  # type: ignore[attr-defined]
            yield _plain(copies, batch, threads)
            return
        torch.set_num_threads(1)
        with Loader(
            data, seed=0, batch=batch, start=0, stop=10**9, rank=0, world_size=1, device=cpu, prefetch=PREFETCH,
            rows=rows,
        ) as loader:  # fmt: skip
            yield iter(loader)


def _plain(arrays: dict[str, np.ndarray], batch: int, threads: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    buffers = {name: np.empty((batch, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
    cuts = [slice(batch * i // threads, batch * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        while True:
            slots = rng.integers(len(arrays["moments"]), size=batch)

            def take(cut: slice, slots: np.ndarray = slots) -> None:
                for name, array in arrays.items():
                    np.take(array, slots[cut], axis=0, out=buffers[name][cut], mode="clip")

            list(pool.map(take, cuts))
            yield buffers


def measure(root: str, variant: str, threads: int, batch: int, seconds: float, step_s: float) -> dict[str, float]:
    """One run, in this process."""
    from trainer.config.presets import preset
    from trainer.config.tree import override
    from trainer.data.groups import open_data

    data = open_data(override(preset("sit-b-2"), {"store": root, "data.threads": threads}))
    found: dict[str, float] = {}
    with batches(variant, data, batch, threads) as endless:
        for name, pause_s in (("free", 0.0), ("paced", step_s)):
            for _ in range(WARM_UP):
                next(endless)
            n, start_s, start_cpu_s = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start_s < seconds:
                next(endless)
                n += 1
                if pause_s:
                    time.sleep(pause_s)
            passed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            found |= {f"{name} batches/s": n / passed_s, f"{name} cpu ms": cpu_s / n * 1e3}
    data.close()
    return found


def main() -> None:
    """Make the store, measure every variant, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of the store (default 2048)")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch (default 256)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timed run (default 4)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of the model that sleeps (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds through all variants (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads that gather (default 2)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the store is made (default here)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    folder = Path(tempfile.mkdtemp(dir=args.directory, prefix=".bench-"))
    try:
        ours.write(folder / "store", SPECS["float16"], args.rows)
        for variant in VARIANTS * args.rounds:
            task: dict[str, Any] = {"root": str(folder / "store"), "variant": variant, "threads": args.threads}
            task |= {"batch": args.batch, "seconds": args.seconds, "step_s": args.step_ms / 1e3}
            command = [sys.executable, "-m", "benchmarks.resident", "--measure", json.dumps(task)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[variant].append(json.loads(done.stdout))
        where = machine(folder, ("torch", "numpy"))
    finally:
        shutil.rmtree(folder)
    lines = []
    for variant, found in runs.items():
        of = {name: statistics.median(run[name] for run in found) for name in found[0]}
        shares = [
            statistics.median(run[name] / base[name] for run, base in zip(found, runs[beside], strict=True))
            for name, beside in (("free batches/s", "plain array"), ("paced batches/s", "in place"))
        ]
        lines.append([
            variant, f"{of['free batches/s']:,.1f}", f"{shares[0]:.2f}", f"{of['free cpu ms']:.1f}",
            f"{of['paced batches/s']:.3f}", f"{shares[1]:.3f}", f"{of['paced cpu ms']:.1f}",
        ])  # fmt: skip
    header = ["variant", "batches/s", "of plain array", "CPU ms a batch", f"steps of {args.step_ms:.0f} ms: steps/s",
              "of in place", "CPU ms a step"]  # fmt: skip
    text = "\n".join([
        "## Resident data", "", where, "",
        f"Batches of {args.batch} rows of 410 kB, shuffled, {args.threads} threads; medians of {args.rounds} rounds of "
        f"{args.seconds:g} s, ratios within a round.", "", table(header, lines), "",
    ])  # fmt: skip
    print(text)
    (RESULTS / "resident.md").write_text(text)


if __name__ == "__main__":
    main()
