"""Publishing shards, side by side: rows a second from memory to a shard under its final name.

    make bench                        # or: .venv-bench/bin/python -m benchmarks.storage_write --help

A shard is 256 rows of patch features (256 × 768 float16, 393 kB), in memory beforehand. `ours` is the whole of
`publish_unit`: checksums, temporary name, rename, receipt. `writev` is the same bytes by one `os.writev` after another
to a new file, without checksums made. zarr-python, zarrs and TensorStore write one whole shard of the same layout and
codecs. Nobody syncs, as none of the others can; the rows "with fsync" add it to the two that can. Rounds go through all
contestants in turn; files are removed between runs; medians over rounds, ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts
import zarr
import zarrs  # noqa: F401
from zarr.codecs import Crc32cCodec

from benchmarks.contestants import SPECS, make_rows
from benchmarks.report import RESULTS, bars, machine, table
from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_group, create_store, publish_unit
from storage.base.files import write_all
from storage.identity import FeaturesIdentity
from storage.index import make_index

N_SHARDS, ROWS = 3, 256
SHAPE = (ROWS, 1, 256, 768)
Writer = Callable[[Path, np.ndarray], float]


def ours(fsync: bool) -> Writer:
    def write(root: Path, data: np.ndarray) -> float:
        store = StoreLayout(n_rows=N_SHARDS * ROWS, views=("original",), resolution=256, shard_rows=ROWS)
        array = ArrayLayout(name="patches", dtype="float16", row_shape=SHAPE[2:], store=store)
        layout = GroupLayout(path="features/f", arrays=(array,))
        keys = [str(row) for row in range(store.n_rows)]
        n = len(keys)
        with Staging(root) as staging:
            create_store(root, store, make_index(keys, [0] * n, ["x"] * n, keys, [1] * n), {}, staging.run_id)
            digest = create_group(root, layout, FeaturesIdentity(name="f"), {}, staging.run_id)
            staging.prepare(layout.path)
            start_s = time.perf_counter()
            for unit in range(N_SHARDS):
                publish_unit(root, layout, digest, unit, {"patches": data}, [], staging.run_id, {}, fsync=fsync)
            return time.perf_counter() - start_s

    return write


def writev(fsync: bool) -> Writer:
    def write(root: Path, data: np.ndarray) -> float:
        rows = list(data.reshape(ROWS, -1).view(np.uint8))
        check = np.zeros(4, np.uint8)
        buffers = [buffer for row in rows for buffer in (row, check)]
        root.mkdir()
        start_s = time.perf_counter()
        for unit in range(N_SHARDS):
            fd = os.open(root / str(unit), os.O_WRONLY | os.O_CREAT, 0o644)
            write_all(fd, buffers)
            if fsync:
                os.fsync(fd)
            os.close(fd)
        return time.perf_counter() - start_s

    return write


def zarr_python(with_zarrs: bool) -> Writer:
    def write(root: Path, data: np.ndarray) -> float:
        pipeline = "zarrs.ZarrsCodecPipeline" if with_zarrs else "zarr.core.codec_pipeline.BatchedCodecPipeline"
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.create_array(
                root, shape=(N_SHARDS * ROWS, *SHAPE[1:]), shards=SHAPE, chunks=(1, 1, *SHAPE[2:]), dtype="float16",
                compressors=[Crc32cCodec()], filters=None, fill_value=0,
            )  # fmt: skip
            start_s = time.perf_counter()
            for unit in range(N_SHARDS):
                array[unit * ROWS : (unit + 1) * ROWS] = data
            return time.perf_counter() - start_s

    return write


def tensorstore(root: Path, data: np.ndarray) -> float:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"chunk_shape": (1, 1, *SHAPE[2:]), "codecs": [little, {"name": "crc32c"}],
             "index_codecs": [little, {"name": "crc32c"}]}  # fmt: skip
    metadata = {
        "shape": (N_SHARDS * ROWS, *SHAPE[1:]), "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": SHAPE}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }  # fmt: skip
    kvstore = {"driver": "file", "path": str(root), "file_io_sync": False}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "create": True}).result()
    start_s = time.perf_counter()
    for unit in range(N_SHARDS):
        array[unit * ROWS : (unit + 1) * ROWS].write(data, can_reference_source_data_indefinitely=True).result()
    return time.perf_counter() - start_s


WRITERS: dict[str, Writer] = {
    "ours": ours(False), "writev": writev(False), "tensorstore": tensorstore, "zarr-python": zarr_python(False),
    "zarr-python with zarrs": zarr_python(True), "ours with fsync": ours(True), "writev with fsync": writev(True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    Path(".bench").mkdir(exist_ok=True)
    data = np.ascontiguousarray(make_rows(SPECS["float16"], 0, ROWS)["patches"][:, None])
    seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
    cpu_s: dict[str, list[float]] = {name: [] for name in WRITERS}
    for number in range(args.rounds + 1):  # the first is not counted
        for name, write in WRITERS.items():
            root = Path(tempfile.mkdtemp(dir=".bench")) / "data"
            cpu_start_s = time.process_time()
            took_s = write(root, data)
            if number:
                seconds[name].append(took_s)
                cpu_s[name].append(time.process_time() - cpu_start_s)
            shutil.rmtree(root.parent)
            os.sync()
        print(f"round {number} of {args.rounds} done", file=sys.stderr)
    n_rows, row_bytes = N_SHARDS * ROWS, data.nbytes // ROWS
    rates = {name: n_rows / statistics.median(found) for name, found in seconds.items()}

    def ratio(name: str) -> str:
        pairs = zip(seconds["ours"], seconds[name], strict=True)
        return f"{statistics.median(b / a for a, b in pairs):.2f}"

    order = sorted(rates, key=lambda name: -rates[name])
    rows = [
        [name, f"{rates[name]:,.0f}", f"{rates[name] * row_bytes / 1e9:.2f}",
         f"{statistics.median(cpu_s[name]) / n_rows * 1e6:.0f}", ratio(name)]
        for name in order
    ]  # fmt: skip
    synced = zip(seconds["ours with fsync"], seconds["writev with fsync"], strict=True)
    packages = ("numpy", "zarr", "zarrs", "tensorstore")
    heading = "Publishing shards of 256 rows of 393 kB, float16"
    text = "\n".join([
        f"## {heading}", "", machine(Path(".bench"), packages), "",
        f"{N_SHARDS} shards a run, median of {args.rounds} rounds; last column: median of the ratios within a round.",
        "", table(["writer", "rows/s", "GB/s", "CPU µs a row", "ours / this"], rows), "",
        f"- ours / writev, both with fsync: {statistics.median(b / a for a, b in synced):.2f}", "",
    ])  # fmt: skip
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "storage_write.md").write_text(text)
    bars(RESULTS / "storage_write.png", heading, order, [rates[name] for name in order], "rows/s")


if __name__ == "__main__":
    main()
