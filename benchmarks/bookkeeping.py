"""What a very large store costs beside its bytes: 100,000 shards, a billion rows.

    .venv-bench/bin/python -m benchmarks.bookkeeping      # --help; `make bench` runs it too, up to 10,000 shards

Stores of 1,000, 10,000 and 100,000 shards of 512 rows, and of 100,000 shards of 10,000 rows, are made for real (index,
metadata, receipts, a sparse file a shard of the right size with a true index), and opened in processes of their own:
time, resident memory, and then gathers of 64 random rows with 1,024 open files allowed. Chunks are holes, so what is
measured is everything but the bytes. The largest takes 30 GB of disk and ten minutes to make. The order is asked for at
a billion rows and more, where nothing but its arguments exists.
"""

from __future__ import annotations

import argparse
import hashlib
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
import pyarrow.parquet as pq
from crc32c import crc32c

from benchmarks.report import RESULTS, machine, table
from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_group, open_store
from storage.identity import FeaturesIdentity
from storage.index import ROW_GROUP, SCHEMA
from storage.layout import FORMAT_VERSION, INDEX_FILE, METADATA, STORE_RECEIPT
from storage.metadata import node_metadata
from storage.order import Order
from storage.receipts import Receipt, ShardRecord, seal, sha256

GROUP = "features/f"
CLASSES = [f"class{label}" for label in range(1000)]


def make_root(root: Path, store: StoreLayout) -> None:
    """Index and metadata, a row group at a time: `create_store` wants the whole index, which may not fit."""
    root.mkdir()
    with pq.ParquetWriter(root / INDEX_FILE, SCHEMA, compression="zstd") as file:
        for start in range(0, store.n_rows, ROW_GROUP):
            rows = np.arange(start, min(start + ROW_GROUP, store.n_rows))
            labels, keys = rows % len(CLASSES), pa.array(rows).cast(pa.string())
            names = pa.DictionaryArray.from_arrays(labels.astype(np.int32), CLASSES)
            file.write_table(pa.table([keys, labels, names, keys, np.ones(len(rows), np.int64)], schema=SCHEMA))
    attributes = {
        "format_version": FORMAT_VERSION, "n_rows": store.n_rows, "views": list(store.views),
        "resolution": store.resolution, "shard_rows": store.shard_rows, "index_digest": "not computed",
    }  # fmt: skip
    metadata = node_metadata("", attributes, None)[METADATA]
    (root / METADATA).write_bytes(metadata)
    with open(root / INDEX_FILE, "rb") as raw:
        digests = {INDEX_FILE: hashlib.file_digest(raw, "sha256").hexdigest(), METADATA: sha256(metadata)}
    (root / STORE_RECEIPT).parent.mkdir()
    (root / STORE_RECEIPT).write_bytes(seal({"format_version": FORMAT_VERSION, "files": digests}))


def make(root: Path, n_shards: int, shard_rows: int) -> None:
    """A store whose chunks are zeros that were never written."""
    store = StoreLayout(n_rows=n_shards * shard_rows, views=("original",), resolution=256, shard_rows=shard_rows)
    array = ArrayLayout(name="patches", dtype="float16", row_shape=(256, 768), store=store)
    layout = GroupLayout(path=GROUP, arrays=(array,))
    index = np.empty((shard_rows, 2), "<u8")
    index[:, 0] = np.arange(shard_rows) * array.stored_bytes
    index[:, 1] = array.stored_bytes
    tail = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    crcs = ShardRecord.pack(np.full(shard_rows, crc32c(bytes(array.chunk_bytes)), np.uint32))
    nbytes = shard_rows * array.stored_bytes + len(tail)
    make_root(root, store)
    with Staging(root) as staging:
        digest = create_group(root, layout, FeaturesIdentity(name="f"), {}, staging.run_id)
    (root / layout.receipt_key(0)).parent.mkdir(parents=True, exist_ok=True)
    for unit in range(n_shards):
        path = root / GROUP / "patches" / array.shard_key(unit)
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            file.seek(nbytes - len(tail))
            file.write(tail)
    for unit in range(n_shards):  # after all shards, so that they are in the page cache
        record = ShardRecord(path=f"patches/{array.shard_key(unit)}", nbytes=nbytes, chunk_crc32c=crcs)
        rows = (unit * shard_rows, (unit + 1) * shard_rows)
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
    assert len(store.classes.labels) == store.n_rows
    found["classes_s"] = time.perf_counter() - start_s
    found["classes_mb"] = rss_mb() - before_mb
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
    parser.add_argument(
        "--stores", nargs="+", metavar="SHARDSxROWS", default=["1000x512", "10000x512", "100000x512", "100000x10000"],
        help="shards, and rows a shard (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        print(json.dumps(look(args.look)))
        return
    Path(".bench").mkdir(exist_ok=True)
    lines = []
    for n_shards, shard_rows in (map(int, store.split("x")) for store in args.stores):
        root = Path(tempfile.mkdtemp(dir=".bench")) / "store"
        try:
            start_s = time.perf_counter()
            make(root, n_shards, shard_rows)
            print(f"made in {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.bookkeeping", "--look", str(root)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        finally:
            shutil.rmtree(root.parent)
        lines.append([
            f"{n_shards:,}", f"{n_shards * shard_rows:,}", f"{found['open_store_ms']:.0f}", f"{found['group_s']:.2f}",
            f"{found['group_s'] / n_shards * 1e6:.0f}", f"{found['group_mb']:.0f}", f"{found['first_ms']:.1f}",
            f"{found['later_ms']:.1f}", f"{found['reading_mb']:.0f}", f"{found['files']:.0f}",
            f"{found['classes_s']:.2f}", f"{found['classes_mb']:.0f}",
        ])  # fmt: skip
        print(lines[-1], file=sys.stderr)
    header = ["shards", "rows", "open store, ms", "open group, s", "µs a shard", "MB", "first batches, ms each",
              "later, ms", "MB more", "open files", "labels, s", "labels, MB"]  # fmt: skip
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
