"""The trainer's loader with features as latents, by codec: images a second and CPU time, beside float16.

    .venv/bin/python -m benchmarks.feature_loader        # --help; stores of 350 MB are made and removed

An image is 256 tokens of 384 channels, as DINOv2-S has them at 256 px; one features group is read, no other array, in
shuffled batches with a model that does nothing: from a warm page cache, read only, as a GPU is given them, and decoded
too, here on the CPU; and cold, each store's pages dropped (`posix_fadvise`) before a round of at most one visit a row,
whose chunks are checked on the way. Codecs take turns in one process, --rounds times for --seconds each; figures are
medians over rounds, and ratios are medians of the ratio to float16 of the same round, which a machine that does other
things meanwhile changes least. CPU is of the whole process, user and system.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import RESULTS, machine, table
from benchmarks.storage_read import evict
from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_group, create_store, publish_unit
from storage.codecs import CODECS
from storage.identity import FeaturesIdentity
from storage.index import make_index
from storage.torch.codecs import Tokens
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.groups import open_data
from trainer.data.loader import Batch, Loader

NAMES = ("float16", "int8", "rotated4")
TOKENS, SIDE = (256, 384), 16
SHARD_ROWS, WARM_UP = 512, 3
GROUP = "features/f"


def write(root: Path, name: str, n_rows: int) -> int:
    """A store of random tokens in a codec; returns bytes a row."""
    codec = CODECS[name]
    store = StoreLayout(n_rows=n_rows, views=("original",), resolution=256, shard_rows=SHARD_ROWS)
    arrays = tuple(
        ArrayLayout(name=array, dtype=dtype, row_shape=shape, store=store)
        for array, (dtype, shape) in codec.arrays(*TOKENS).items()
    )
    layout = GroupLayout(path=GROUP, arrays=arrays)
    identity = FeaturesIdentity(
        name="f", token_grid=(SIDE, SIDE), width=TOKENS[1], tokens="patch", dtype=codec.dtype, codec=codec.identity
    )
    keys = [str(row) for row in range(n_rows)]
    with Staging(root) as staging:
        create_store(
            root, store, make_index(keys, [0] * n_rows, ["c"] * n_rows, keys, [0] * n_rows), {}, staging.run_id
        )
        digest = create_group(root, layout, identity, {}, staging.run_id)
        staging.prepare(GROUP)
        for unit in range(store.n_units):
            rows = np.asarray(store.unit_rows(unit))
            tokens = np.random.default_rng(unit).standard_normal((len(rows), *TOKENS), np.float32)
            stored = {of: values[:, None] for of, values in codec.encode(tokens, rows, 0).items()}
            publish_unit(root, layout, digest, unit, stored, [], staging.run_id, {})
    return layout.sample_bytes


class Undecoded(Loader):
    """A loader whose device decodes in no time."""

    def _tokens(self, on_device: dict[str, Tensor]) -> dict[str, Tokens]:
        return {}

    def _latents(self, on_device: dict[str, Tensor], tokens: dict[str, Tokens]) -> Tensor:
        return on_device["rows"]


COLD = "read, cold"
KINDS: dict[str, type[Loader]] = {"read": Undecoded, "read and decoded": Loader, COLD: Undecoded}
Found = dict[tuple[str, str], list[tuple[float, float]]]  # by kind and codec: images a second, CPU µs an image


def timed(batches: Iterator[Batch], batch: int, seconds: float, most: float = math.inf) -> tuple[float, float]:
    """Images a second, and CPU microseconds an image; at most so many images."""
    n = 0
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    while (passed_s := time.perf_counter() - start_s) < seconds and n < most:
        next(batches)
        n += batch
    return n / passed_s, (time.process_time() - start_cpu_s) / n * 1e6


def measure(folder: Path, args: Any) -> tuple[dict[str, int], Found]:
    """Bytes a row by codec, and what each round found."""
    sizes = {name: write(folder / name, name, args.rows) for name in NAMES}
    found: Found = {each: [] for each in itertools.product(KINDS, NAMES)}
    changes: dict[str, Any] = {"data.latents": GROUP, "model.class_token": False, "data.threads": 1}
    for _ in range(args.rounds):
        for kind, name in found:
            if kind == COLD:
                evict(folder / name)
            with ExitStack() as stack:
                data = open_data(override(preset("rit-xl-1"), {**changes, "store": folder / name}))
                stack.callback(data.close)
                loader = KINDS[kind](
                    data, seed=0, batch=args.batch, start=0, stop=10**9, rank=0, world_size=1,
                    device=torch.device("cpu"), prefetch=3, with_targets=False,
                )  # fmt: skip
                batches = iter(stack.enter_context(loader))
                epoch = args.rows // args.batch
                if kind == COLD:  # a second visit would be warm
                    found[kind, name].append(timed(batches, args.batch, args.seconds, epoch * args.batch))
                    continue
                for _ in range(WARM_UP + epoch):  # every chunk is checked once, and is in memory
                    next(batches)
                found[kind, name].append(timed(batches, args.batch, args.seconds))
    return sizes, found


def main() -> None:
    """Make the stores, measure, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="rows of each store (default 1024)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default 64)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timed run (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds through all codecs (default 5)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the stores are made (default here)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.directory, prefix=".bench-"))
    try:
        sizes, found = measure(folder, args)
        where = machine(folder, ("torch", "numpy"))
    finally:
        shutil.rmtree(folder)
    lines = []
    for (kind, name), rounds in found.items():
        speed, cpu = (statistics.median(each[i] for each in rounds) for i in (0, 1))
        by_round = list(zip(rounds, found[kind, "float16"], strict=True))
        ratios = [statistics.median(mine[i] / plain[i] for mine, plain in by_round) for i in (0, 1)]
        cells = [f"{speed:,.0f}", f"{ratios[0]:.2f}", f"{cpu:,.0f}", f"{ratios[1]:.2f}"]
        lines.append([f"{name}, {kind}", f"{sizes[name]:,}", *cells])
    text = "\n".join([
        "## Features as latents from a store", "", where, "",
        f"Batches of {args.batch} images of {TOKENS[0]} × {TOKENS[1]}, shuffled, from a warm page cache unless said, "
        f"one thread that reads and one that decodes; medians of {args.rounds} rounds of {args.seconds:g} s.", "",
        table(["codec", "bytes an image", "images/s", "of float16", "CPU µs an image", "of float16"], lines), "",
    ])  # fmt: skip
    print(text)
    (RESULTS / "feature_loader.md").write_text(text)


if __name__ == "__main__":
    main()
