"""Shuffled reads, side by side: how many samples a second reach torch tensors, and what they cost.

    make bench                        # or: .venv-bench/bin/python -m benchmarks.storage_read --help

A sample is a row of patch features (256 × 768) and its moments (8 × 32 × 32), in batches of --batch, in random order
over the whole set. Every format is written by its own library and read as its own documentation recommends; of its
variants and of 0, 2 and 4 worker processes a scouting round finds the best, which alone is measured (`contestants/`).
Where a format can be read by index, a loop written by hand around it, which no documentation shows, is measured beside
that. With `--beside rotated1 int8` ours is measured in these codecs too, which no other format has, beside all formats
at --dtype: codes are handed over packed, as the trainer takes them to its device, and what decoding them costs two
cores stands below the table.

A run is a process of its own: it opens the data, reads for a second without being timed, then for --seconds. Rounds go
through all contestants in turn, so that a slow minute of the machine is shared; ratios are taken within a round, and
medians over rounds. Rows are compared with what was written in a separate run. `warm`: everything lies in the page
cache. `cold`: each file's pages are dropped (`posix_fadvise`) before each run, and there is no second of warming up, so
that starting worker processes counts.

CPU is of the process and its workers, user and system. RSS is the largest sum over them seen, in which shared pages
count more than once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestants import NAMES, SPECS, contestant, make_rows
from benchmarks.contestants.loaders import LOOP
from benchmarks.report import RESULTS, bars, machine, table
from storage.codecs import CODECS

PACKAGES = (
    "torch", "numpy", "zarr", "zarrs", "tensorstore", "grain", "array-record", "safetensors", "mosaicml-streaming",
    "litdata", "webdataset", "h5py", "datasets",
)  # fmt: skip
ALWAYS = ("ours", "preadv")  # every variant of these is measured, since the targets are ratios of them


def evict(root: Path) -> None:
    """Drop every file's pages from the cache."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import psutil
    import torch

    torch.set_num_threads(1)
    spec, root, n_rows = SPECS[task["dtype"]], Path(task["root"]), task["rows"]
    module = contestant(task["name"])
    rng = np.random.default_rng(task["seed"])
    batch_rows = task["batch"]
    per_epoch = n_rows // batch_rows * batch_rows
    own = task["variant"] in getattr(module, "OWN_ORDER", ())

    def forever() -> Any:
        while True:
            order = rng.permutation(n_rows)[:per_epoch]
            if not own:
                order = np.concatenate([order, *(rng.permutation(n_rows)[:per_epoch] for _ in range(task["epochs"]))])
            yield from module.batches(root, spec, order, batch_rows, task["variant"], task["workers"])

    if task["check"]:
        return check(spec, n_rows, forever(), own)
    if task["cold"]:
        evict(root)
    me = psutil.Process()
    peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            with contextlib.suppress(psutil.Error):
                peak[0] = max(peak[0], sum(p.memory_info().rss for p in [me, *me.children(recursive=True)]))

    def cpu_s() -> float:
        total = 0.0
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    stream = iter(forever())
    start_s = time.perf_counter()
    if not task["cold"]:
        next(stream)
        while time.perf_counter() - start_s < 1.0:
            next(stream)
    n = 0
    cpu_start_s, start_s = cpu_s(), time.perf_counter()
    while (seconds := time.perf_counter() - start_s) < task["seconds"]:
        batch = next(stream)
        n += len(batch["moments"])
        if task["cold"] and n >= per_epoch:  # a second visit would be warm
            seconds = time.perf_counter() - start_s
            break
    # Workers that ended meanwhile took their times with them: then there is no figure.
    cpu_us = max(-1.0, (cpu_s() - cpu_start_s) / n * 1e6)
    done.set()
    return {"rows_s": n / seconds, "cpu_us": cpu_us, "rss_mb": peak[0] / 1e6}


def check(spec: Any, n_rows: int, stream: Any, own: bool) -> dict[str, Any]:
    """Whether the first batches are rows that were written, each with its own moments."""
    wanted: dict[bytes, bytes] = {}
    for start in range(0, n_rows, 512):
        data = make_rows(spec, start, min(n_rows, start + 512))
        for i in range(len(data["moments"])):
            wanted[data["moments"][i].tobytes()] = b"".join(data[a.name][i].tobytes()[:4096] for a in spec[:-1])
    for _ in range(4):
        batch = next(stream)
        for i in range(len(batch["moments"])):
            found = b"".join(batch[a.name][i].numpy().tobytes()[:4096] for a in spec[:-1])
            assert wanted[batch["moments"][i].numpy().tobytes()] == found
    return {"checked": True}


def child(task: dict[str, Any]) -> dict[str, Any] | None:
    """Run `measure` in a process of its own; None, with the reason on stderr, when it fails."""
    command = [sys.executable, "-m", "benchmarks.storage_read", "--task", json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    except subprocess.TimeoutExpired:
        print(f"{task['name']} ({task['variant']}, {task['workers']} workers): no answer in 180 s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{task['name']} ({task['variant']}, {task['workers']} workers): {last}", file=sys.stderr)
        return None
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=None, help="where data are written (default: a folder in .bench/)")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--dtype", choices=SPECS, default="float16")
    parser.add_argument("--beside", nargs="+", choices=SPECS, default=[], help="ours in other codecs, beside the rest")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        if task["write"]:
            contestant(task["name"]).write(Path(task["root"]), SPECS[task["dtype"]], task["rows"])
            print("RESULT {}")
        else:
            print("RESULT " + json.dumps(measure(task)), flush=True)
        os._exit(0)  # libraries that leave threads and workers behind
    Path(".bench").mkdir(exist_ok=True)
    root = args.root or Path(tempfile.mkdtemp(dir=".bench"))
    try:
        compare(args, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def compare(args: argparse.Namespace, root: Path) -> None:
    base = {"rows": args.rows, "batch": args.batch, "cold": args.cache == "cold", "check": False, "write": False}
    entries: dict[str, dict[str, Any]] = {}
    for name, dtype in [(n, d) for n in args.only for d in (args.dtype, *(args.beside if n == "ours" else ()))]:
        base |= {"dtype": dtype}
        module = contestant_about(name)
        called = name if dtype == args.dtype else f"{name}, {dtype}"
        place = root / (module["shares"] or called)
        if not module["shares"]:
            start_s = time.perf_counter()
            if child({**base, "name": name, "root": str(place), "write": True, "variant": "", "workers": 0}) is None:
                continue
            print(f"{name}: written in {time.perf_counter() - start_s:.1f} s", file=sys.stderr)
        tried = {}
        for variant in module["variants"]:
            for workers in module["workers"] if LOOP not in variant else (0,):
                task = {**base, "name": name, "root": str(place), "variant": variant, "workers": workers, "epochs": 9,
                        "seed": 0, "seconds": 1.5}  # fmt: skip
                found = child(task)
                if found is not None:
                    tried[variant, workers] = found["rows_s"]
                    print(f"  {name}, {variant}, {workers} workers: {found['rows_s']:.0f} rows/s", file=sys.stderr)
        for variant, workers in chosen(name, tried)[: None if dtype == args.dtype else 1]:
            label = f"{called.replace('_', ' ')}: {variant}" + (f", {workers} workers" if workers else "")
            entries[label] = {**base, "name": name, "root": str(place), "variant": variant, "workers": workers,
                              "epochs": 40, "seconds": args.seconds}  # fmt: skip
            if child({**entries[label], "seed": 1, "check": True}) is None:
                raise SystemExit(f"{label} read rows that were never written")
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in entries}
    for number in range(args.rounds):
        for label, task in entries.items():
            found = child({**task, "seed": 100 + number})
            if found is not None:
                results[label].append(found)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    results = {label: found for label, found in results.items() if len(found) == args.rounds}
    write_report(args, root, results)


def chosen(name: str, tried: dict[tuple[str, int], float]) -> list[tuple[str, int]]:
    """What is measured: the best as documented, the best hand-written loop, and all of ours and of plain preadv."""
    by_rate = sorted(tried, key=lambda key: -tried[key])
    if name in ALWAYS:
        return by_rate
    return [*[key for key in by_rate if LOOP not in key[0]][:1], *[key for key in by_rate if LOOP in key[0]][:1]]


def contestant_about(name: str) -> dict[str, Any]:
    """A contestant's variants and the like."""
    module = contestant(name)
    return {"variants": list(module.VARIANTS), "workers": module.WORKERS, "shares": getattr(module, "SHARES", "")}


def write_report(args: argparse.Namespace, root: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    row_bytes = {dtype: sum(array.n_bytes for array in SPECS[dtype]) for dtype in SPECS}
    middle = {
        label: {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        for label, rounds in results.items()
    }
    if args.beside:  # every line beside the best of the other formats
        base = max((label for label in results if is_peer(label)), key=lambda label: middle[label]["rows_s"])
        column, explained = "this / best peer", f"beside `{base}`, the best of the formats that are not ours"
    else:
        base = max((label for label in results if label.startswith("ours")), key=lambda label: middle[label]["rows_s"])
        column, explained = "ours / this", f"how many times faster is `{base}`"

    def ratio(label: str) -> str:
        a, b = (results[label], results[base]) if args.beside else (results[base], results[label])
        return f"{statistics.median(x['rows_s'] / y['rows_s'] for x, y in zip(a, b, strict=True)):.2f}"

    def bytes_of(label: str) -> int:
        return row_bytes[next((d for d in args.beside if label.startswith(f"ours, {d}:")), args.dtype)]

    order = sorted(middle, key=lambda label: -middle[label]["rows_s"])
    rows = [
        [label, f"{middle[label]['rows_s']:,.0f}", f"{bytes_of(label) / 1e3:.0f}",
         f"{middle[label]['rows_s'] * bytes_of(label) / 1e9:.2f}",
         f"{middle[label]['cpu_us']:.0f}" if middle[label]["cpu_us"] > 0 else "–",
         f"{middle[label]['rss_mb']:.0f}", ratio(label)]
        for label in order
    ]  # fmt: skip
    size = "" if args.beside else f" ({row_bytes[args.dtype] / 1e3:.0f} kB a row)"
    heading = f"Shuffled reads, {args.dtype} features and moments{size}, {args.cache} cache"
    lines = [
        f"## {heading}", "", machine(root, PACKAGES), "",
        f"{args.rows} rows, batches of {args.batch}, median of {args.rounds} rounds of {args.seconds:g} s. "
        f"Last column: {explained}, median of the ratios within a round.", "",
        table(["reader", "rows/s", "kB a row", "GB/s", "CPU µs a row", "peak RSS MB", column], rows), "",
        *target_lines(results), *(decode_lines(args) if args.beside else ()), "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    name = f"storage_read_{'codes' if args.beside else args.dtype}_{args.cache}"
    (RESULTS / f"{name}.md").write_text(text)
    bars(RESULTS / f"{name}.png", heading, order, [middle[label]["rows_s"] for label in order], "rows/s")


def is_peer(label: str) -> bool:
    """Whether a reader is of another format: not ours, nor a plain file without one."""
    return not label.startswith(("ours", "preadv"))


def decode_lines(args: argparse.Namespace) -> list[str]:
    """What decoding a batch to float32 costs in torch on two cores, median of five."""
    import torch

    from storage.torch.codecs import twin_of

    torch.set_num_threads(2)
    lines = []
    for dtype in (args.dtype, *args.beside):
        data = make_rows(SPECS[dtype], 0, args.batch)
        stored = {a.name: torch.from_numpy(data[a.name]) for a in SPECS[dtype][:-1]}
        twin, rows, times_s = twin_of(CODECS[dtype]), torch.arange(args.batch), []
        for _ in range(6):
            start_s = time.perf_counter()
            twin.decode(stored, rows, torch.zeros_like(rows))
            times_s.append(time.perf_counter() - start_s)
        ms = 1e3 * statistics.median(times_s[1:])
        lines.append(f"- decoding {dtype}: {ms:.0f} ms a batch of {args.batch}, {1e3 * args.batch / ms:,.0f} rows/s")
    return lines


def target_lines(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Ours against plain preadv with the same number of threads."""
    lines = []
    for n_threads in ("1 thread", "2 threads"):
        ours, plain = results.get(f"ours: {n_threads}"), results.get(f"preadv: {n_threads}")
        if ours and plain:
            ratio = statistics.median(a["rows_s"] / b["rows_s"] for a, b in zip(ours, plain, strict=True))
            lines.append(f"- ours / preadv, {n_threads}: {ratio:.2f}")
    return lines


if __name__ == "__main__":
    main()
