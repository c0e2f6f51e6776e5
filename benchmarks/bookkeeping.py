"""What a very large store costs beside its bytes: 100,000 shards, a billion rows.

    .venv-bench/bin/python -m benchmarks.bookkeeping      # --help; `make bench` runs it too, up to 10,000 shards

Stores of 1,000, 10,000 and 100,000 shards are made for real (metadata, receipts, a sparse file a shard of the right
size with a true index), and opened in processes of their own: time, resident memory, and then gathers of 64 random rows
with 1,024 open files allowed. Chunks are holes, so what is measured is everything but the bytes. The order is asked for
at a billion rows and more, where nothing but its arguments exists.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from benchmarks.report import RESULTS, machine, table
from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_group, create_store, open_store
from storage.index import SCHEMA, Index
from storage.order import Order
from storage.receipts import Receipt, ShardRecord, seal

SHARD_ROWS = 512
GROUP = "features/f"


def make_samples(n_rows: int) -> Index:
    """An index of 1,000 classes, without a Python object for every row."""
    labels = pa.array(np.arange(n_rows) % 1000)
    names = pa.DictionaryArray.from_arrays(labels.cast(pa.int32()), [f"class{label}" for label in range(1000)])
    keys = pa.array(np.arange(n_rows)).cast(pa.string())
    return Index(pa.table([keys, labels, names, keys, pa.array(np.ones(n_rows, np.int64))], schema=SCHEMA))


def make(root: Path, n_shards: int) -> None:
    """A store whose chunks are zeros that were never written."""
    store = StoreLayout(n_rows=n_shards * SHARD_ROWS, views=("original",), resolution=256, shard_rows=SHARD_ROWS)
    array = ArrayLayout(name="patches", dtype="float16", row_shape=(256, 768), store=store)
    layout = GroupLayout(path=GROUP, arrays=(array,))
    index = np.empty((SHARD_ROWS, 2), "<u8")
    index[:, 0] = np.arange(SHARD_ROWS) * array.stored_bytes
    index[:, 1] = array.stored_bytes
    tail = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    crcs = ShardRecord.pack(np.full(SHARD_ROWS, crc32c(bytes(array.chunk_bytes)), np.uint32))
    nbytes = SHARD_ROWS * array.stored_bytes + len(tail)
    with Staging(root) as staging:
        create_store(root, store, make_samples(store.n_rows), {}, staging.run_id)
        digest = create_group(root, layout, {"name": "f"}, {}, staging.run_id)
    (root / layout.receipt_key(0)).parent.mkdir(parents=True, exist_ok=True)
    for unit in range(n_shards):
        path = root / GROUP / "patches" / array.shard_key(unit)
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            file.seek(nbytes - len(tail))
            file.write(tail)
        record = ShardRecord(path=f"patches/{array.shard_key(unit)}", nbytes=nbytes, chunk_crc32c=crcs)
        rows = (unit * SHARD_ROWS, (unit + 1) * SHARD_ROWS)
        receipt = Receipt(identity_digest=digest, unit=unit, rows=rows, shards=(record,), failed=(), timings_s={})
        (root / layout.receipt_key(unit)).write_bytes(seal(asdict(receipt)))


def rss_mb() -> float:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def look(root: Path) -> dict[str, float]:
    """Open and read, with 1,024 open files allowed."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    found = {"import": rss_mb()}
    start_s = time.perf_counter()
    store = open_store(root)
    found["open_store_ms"] = (time.perf_counter() - start_s) * 1e3
    start_s = time.perf_counter()
    reader = store.group(GROUP, n_threads=2)["patches"]
    found["group_s"] = time.perf_counter() - start_s
    found["group_mb"] = rss_mb() - found["import"]
    rng = np.random.default_rng(0)
    out = np.zeros((64, *reader.row_shape), reader.dtype)
    before_mb = rss_mb()

    def gather(n: int) -> float:
        start_s = time.perf_counter()
        for _ in range(n):
            reader.read_into(rng.integers(0, store.n_rows, 64), 0, out)
        return (time.perf_counter() - start_s) / n * 1e3

    found["first_ms"] = gather(50)
    gather(400)
    found["later_ms"] = gather(50)
    found["reading_mb"] = rss_mb() - before_mb
    found["files"] = len(os.listdir("/proc/self/fd"))
    reader.close()
    before_mb = rss_mb()
    start_s = time.perf_counter()
    _ = store.classes.labels
    found["index_s"] = time.perf_counter() - start_s
    found["index_mb"] = rss_mb() - before_mb
    return found


def order_costs() -> list[list[str]]:
    """Time and memory of a global batch of 256, by the number of rows."""
    lines = []
    for n in (10**6, 10**9, 10**12):
        order = Order(n, 0)
        order.global_batch(0, 256)
        before_mb, start_s = rss_mb(), time.perf_counter()
        for step in range(2000):
            order.global_batch(step * 1000, 256)
        lines.append([f"{n:,}", f"{(time.perf_counter() - start_s) / 2000 * 1e6:.0f}", f"{rss_mb() - before_mb:.1f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        print(json.dumps(look(args.look)))
        return
    Path(".bench").mkdir(exist_ok=True)
    lines = []
    for n_shards in args.shards:
        root = Path(tempfile.mkdtemp(dir=".bench")) / "store"
        try:
            make(root, n_shards)
            command = [sys.executable, "-m", "benchmarks.bookkeeping", "--look", str(root)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        finally:
            shutil.rmtree(root.parent)
        lines.append([
            f"{n_shards:,}", f"{n_shards * SHARD_ROWS:,}", f"{found['open_store_ms']:.0f}", f"{found['group_s']:.2f}",
            f"{found['group_s'] / n_shards * 1e6:.0f}", f"{found['group_mb']:.0f}", f"{found['first_ms']:.1f}",
            f"{found['later_ms']:.1f}", f"{found['reading_mb']:.0f}", f"{found['files']:.0f}",
            f"{found['index_s']:.2f}", f"{found['index_mb']:.0f}",
        ])  # fmt: skip
        print(lines[-1], file=sys.stderr)
    header = ["shards", "rows", "open store, ms", "open group, s", "µs a shard", "MB", "first batches, ms each",
              "later, ms", "MB more", "open files", "index, s", "index, MB"]  # fmt: skip
    text = "\n".join([
        "## Bookkeeping of large stores", "", machine(Path(".bench"), ("numpy", "pyarrow", "zarr")), "",
        "Batches of 64 random rows of 393 kB (holes in sparse files), 2 threads, 1,024 open files allowed.", "",
        table(header, lines), "", "The order, a global batch of 256:", "",
        table(["rows", "µs a batch", "MB more"], order_costs()), "",
    ])  # fmt: skip
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bookkeeping.md").write_text(text)


if __name__ == "__main__":
    main()
