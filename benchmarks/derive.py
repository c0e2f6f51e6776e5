"""How quickly `python -m storage derive` makes coded features, beside reading alone and encoding alone.

    python -m benchmarks.derive [--rows 1024] [--width 768] [--codec rotated2] [--workers 0] [--repeats 3]

A store of random numbers (`random_store.py`), float16, one view, 256 tokens a row, in a temporary folder; units of 128
rows, so that all workers have several. Each measurement runs in as many processes as `derive` has, each with one
thread of linear algebra, and every one takes turns with the others, the best of `--repeats`:

    reading alone    every row of the parent gathered, its checksums compared, nothing done with it; from the page
                     cache once it has been read, so that a slow disk lowers this figure and the last one alike
    encoding alone   `codec.encode` of rows in memory, one at a time
    derive           the whole command but for starting its processes: read, encode, publish with fsync

The last column is derive's rate over the slower of the other two.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks import random_store
from benchmarks.report import RESULTS, machine, table
from storage import Staging, create_group, open_store
from storage.codecs import CODECS
from storage.derive import ROWS_AHEAD, Job, derive_unit, derived
from storage.layout import RECEIPTS_DIR
from storage.processes import one_blas_thread

SHARD_ROWS = 128
CHILD = "features/child"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--codec", nargs="+", default=["rotated1", "rotated2", "rotated4", "int8"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    random_store.SHARD_ROWS = SHARD_ROWS
    with tempfile.TemporaryDirectory() as folder, one_blas_thread():
        root = Path(folder) / "store"
        random_store.write(root, args.rows, [args.width], "float16")
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            rows = []
            for codec in args.codec:
                rates = dict.fromkeys(("reading alone", "encoding alone", "derive"), 0.0)
                for _ in range(args.repeats):
                    alone: dict[str, Callable[[int], object]] = {
                        "reading alone": partial(_read, root),
                        "encoding alone": partial(_encode, codec, root),
                    }
                    for name, work in alone.items():
                        rates[name] = max(rates[name], _rate(pool, work, args.rows))
                    rates["derive"] = max(rates["derive"], _derive(pool, root, codec, args.rows))
                share = rates["derive"] / min(rates["reading alone"], rates["encoding alone"])
                rows.append([codec, *(f"{rate:,.0f}" for rate in rates.values()), f"{share:.2f}"])
                print(rows[-1], flush=True)
        text = "\n\n".join(
            [
                f"# Deriving coded features\n\n{machine(root, ['numpy'])}",
                f"float16 (256, {args.width}), {args.rows} rows in units of {SHARD_ROWS}, {args.workers} processes; "
                f"rows/s, best of {args.repeats}: `python -m benchmarks.derive`",
                table(["codec", "reading alone", "encoding alone", "derive", "of the slower"], rows),
            ]
        )
    print(text)
    (RESULTS / "derive.md").write_text(text + "\n")


def _rate(pool: ProcessPoolExecutor, work: Callable[[int], object], n_rows: int) -> float:
    units = range(-(-n_rows // SHARD_ROWS))
    start_s = time.perf_counter()
    list(pool.map(work, units))
    return n_rows / (time.perf_counter() - start_s)


def _derive(pool: ProcessPoolExecutor, root: Path, codec: str, n_rows: int) -> float:
    store = open_store(root)
    parent = store.group(random_store.FEATURES, n_threads=1)
    with Staging(root) as staging:
        layout, identity = derived(parent, CHILD, CODECS[codec])
        digest = create_group(root, layout, identity, {}, staging.run_id)
        staging.prepare(CHILD)
        job = Job(
            root=store.root, run_id=staging.run_id, parent=parent, layout=layout, identity=identity, digest=digest
        )
        rate = _rate(pool, partial(derive_unit, job), n_rows)
    shutil.rmtree(root / CHILD)
    shutil.rmtree(root / RECEIPTS_DIR / CHILD)
    return rate


def _read(root: Path, unit: int) -> None:
    group = open_store(root).group(random_store.FEATURES, n_threads=1)
    rows = np.array(group.layout.store.unit_rows(unit))
    for start in range(0, len(rows), ROWS_AHEAD):
        group.gather(rows[start : start + ROWS_AHEAD], 0)
    group.close()


def _encode(codec: str, root: Path, unit: int) -> None:
    group = open_store(root).group(random_store.FEATURES, n_threads=1)
    rows = np.array(group.layout.store.unit_rows(unit))
    tokens = np.random.default_rng(unit).standard_normal((2, *group["patches"].row_shape)).astype(np.float16)
    for i, row in enumerate(rows.tolist()):
        CODECS[codec].encode(tokens[i % 2 : i % 2 + 1], np.array([row]), 0)
    group.close()


if __name__ == "__main__":
    main()
