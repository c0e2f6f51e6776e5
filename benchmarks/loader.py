"""The trainer's loader with a model that does nothing, and with one that takes its time: batches, CPU, stall.

    .venv/bin/python -m benchmarks.loader           # --help; a store of 840 MB is made and removed

A sample is a row of patch features (256 × 768, float16) and its moments (8 × 32 × 32), 410 kB, from a warm page cache.
Each variant runs in a process of its own: it reads a few batches without being timed, then for --seconds with a model
that does nothing, then as long with one that sleeps for --step-ms, as the host does while a GPU is at work. CPU is of
the whole process, user and system; of the second run it is what training leaves to the loader. Rounds go through all
variants in turn; medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contestants import SPECS, ours
from benchmarks.report import RESULTS, machine, table

PREFETCH, THREADS = (1, 3, 8), (1, 2, 4)
WARM_UP = 5


def measure(root: str, prefetch: int, threads: int, batch: int, seconds: float, step_s: float) -> dict[str, float]:
    """One run, in this process."""
    import torch

    from trainer.config.presets import preset
    from trainer.config.tree import override
    from trainer.data.groups import open_data
    from trainer.data.loader import Loader

    torch.set_num_threads(1)
    data = open_data(override(preset("sit-b-2"), {"store": root, "data.threads": threads}))
    found: dict[str, float] = {}
    for name, pause_s in (("free", 0.0), ("paced", step_s)):
        with Loader(
            data, seed=0, batch=batch, start=0, stop=10**9, rank=0, world_size=1, device=torch.device("cpu"),
            prefetch=prefetch,
        ) as loader:  # fmt: skip
            batches = iter(loader)
            for _ in range(WARM_UP):
                next(batches)
            n, stall_s = 0, 0.0
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            while time.perf_counter() - start_s < seconds:
                stall_s += next(batches).stall_s
                n += 1
                if pause_s:
                    time.sleep(pause_s)
            passed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        found |= {f"{name} batches/s": n / passed_s, f"{name} cpu ms": cpu_s / n * 1e3}
        found |= {f"{name} cores": cpu_s / passed_s, f"{name} stall": stall_s / passed_s}
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
    parser.add_argument("--directory", type=Path, default=Path(), help="where the store is made (default here)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    variants = list(itertools.product(PREFETCH, THREADS))
    runs: dict[tuple[int, int], list[dict[str, float]]] = {variant: [] for variant in variants}
    folder = Path(tempfile.mkdtemp(dir=args.directory, prefix=".bench-"))
    try:
        ours.write(folder / "store", SPECS["float16"], args.rows)
        for prefetch, threads in variants * args.rounds:
            task: dict[str, Any] = {"root": str(folder / "store"), "prefetch": prefetch, "threads": threads}
            task |= {"batch": args.batch, "seconds": args.seconds, "step_s": args.step_ms / 1e3}
            command = [sys.executable, "-m", "benchmarks.loader", "--measure", json.dumps(task)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[prefetch, threads].append(json.loads(done.stdout))
        where = machine(folder, ("torch", "numpy"))
    finally:
        shutil.rmtree(folder)
    lines = []
    for (prefetch, threads), found in runs.items():
        of = {name: statistics.median(run[name] for run in found) for name in found[0]}
        lines.append([
            f"{prefetch} ahead, {threads} thread{'s' * (threads > 1)}", f"{of['free batches/s']:.1f}",
            f"{of['free batches/s'] * args.batch:,.0f}", f"{of['free cpu ms']:.0f}", f"{of['free cores']:.2f}",
            f"{of['paced batches/s']:.2f}", f"{of['paced stall']:.1%}", f"{of['paced cores']:.2f}",
        ])  # fmt: skip
    header = ["variant", "batches/s", "rows/s", "CPU ms a batch", "cores",
              f"steps of {args.step_ms:.0f} ms: steps/s", "stall", "cores"]  # fmt: skip
    text = "\n".join([
        "## The trainer's loader", "", where, "",
        f"Batches of {args.batch} rows of 410 kB, shuffled, from a warm page cache; medians of {args.rounds} rounds of "
        f"{args.seconds:g} s.", "", table(header, lines), "",
    ])  # fmt: skip
    print(text)
    (RESULTS / "loader.md").write_text(text)


if __name__ == "__main__":
    main()
