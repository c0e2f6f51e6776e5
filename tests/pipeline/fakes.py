"""A run of the real job with pictures that are made up and an encoder of plain numpy, both sabotaged at will.

    python -m tests.pipeline.fakes STORE '{"address": …}'     one run, as a process of its own; prints what became of it

Pictures are noise, the same for the same row. A row may carry a mark that says what happens to whoever reads or encodes
it. Marks that end in "-once" do it the first time only, which a file in the folder `flags` remembers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import PrecomputeConfig
from pipeline.encode import UnitEncoder
from pipeline.encoders import registry
from pipeline.plan import GroupPlan, Plan, create
from pipeline.sources.listing import Listing
from pipeline.sources.protocol import Sample
from storage import Staging, StoreLayout
from storage.base.console import run_command
from storage.index import Index, make_index
from storage.receipts import scan
from storage.roots import open_root
from tests.stores import FEATURES, LATENTS, make_identities, make_layouts

RESOLUTION = 128
ENCODE_MARKS = ("encode-crash", "encode-raise", "encode-hang", "encode-poison")
MARK = 250  # a picture whose first pixel is (MARK, i, once) is marked ENCODE_MARKS[i] for the encoder
HANG_S = 600.0


def act(mark: str, flags: Path, name: str) -> None:
    """Do what a mark says."""
    if mark.endswith("-once"):
        try:
            (flags / name).touch(exist_ok=False)
        except FileExistsError:
            return
    what = mark.removesuffix("-once").split("-")[1]
    if what == "crash":
        os._exit(17)
    if what == "raise":
        raise OSError(5, f"{mark} of {name}")
    assert what == "hang", mark
    time.sleep(HANG_S)


class Pictures:
    """Noise pictures (RESOLUTION, RESOLUTION, 3), decoded already."""

    kind = "made-up"

    def __init__(self, n: int, marks: Mapping[int, str], flags: str, read_s: float = 0.0) -> None:
        self.n, self.marks, self.flags, self.read_s = n, dict(marks), Path(flags), read_s

    def listing(self) -> Listing:
        keys = [f"{row:06d}" for row in range(self.n)]
        return Listing(index=make_index(keys, [0] * self.n, [""] * self.n, keys, [0] * self.n))

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        for location in locations:
            row = int(location)
            mark = self.marks.get(row, "")
            if mark == "broken":
                yield b"this is no picture"
                continue
            if mark.startswith("decode"):
                act(mark, self.flags, location)
            time.sleep(self.read_s)
            picture = np.random.default_rng(row).integers(0, 240, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            if mark.startswith("encode"):
                picture[0, 0] = MARK, ENCODE_MARKS.index(mark.removesuffix("-once")), mark.endswith("-once")
            yield picture

    def provenance(self) -> dict[str, str]:
        return {"kind": self.kind, "path": "nowhere"}


class NumpyEncoder(UnitEncoder):
    """Values straight from the pixels. The environment says how long a unit takes and where flags lie.

    A unit marked "encode-poison" leaves a process in which every later call fails, as a lost CUDA context does.
    """

    poisoned = False

    def load(self) -> str:
        if os.environ.get("FAKE_LOAD") == "raise":
            raise OSError("no weights here")
        ray = sys.modules.get("ray")  # not imported here: its environment must say before that it stays on 127.0.0.1
        if ray is not None and ray.is_initialized():
            assert self._needs_gpu == bool(ray.get_gpu_ids()), "it was told otherwise"
        return "numpy"

    def encode(
        self, path: str, images: np.ndarray, present: np.ndarray, batch: int, first_row: int = 0, *_: object
    ) -> dict[str, np.ndarray]:
        for i in present.tolist():
            first = images[i, 0, 0].tolist()
            if first[0] == MARK:
                mark = ENCODE_MARKS[first[1]] + ("-once" if first[2] else "")
                if mark == "encode-poison":
                    self.poisoned = True
                    break
                act(mark, Path(os.environ["FAKE_FLAGS"]), f"{mark}-{images[i].sum()}")
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with more checks")
        time.sleep(float(os.environ.get("FAKE_ENCODE_S", "0")))
        x = images.astype(np.float32) / 255
        if path == LATENTS:
            coarse = x[:, ::8, ::8].transpose(0, 3, 1, 2)
            arrays = {"moments": np.concatenate([coarse, coarse, coarse[:, :2]], axis=1)}
        else:
            tokens = x[:, ::16, ::16].reshape(len(x), 64, 3)
            arrays = {"patches": np.tile(tokens, 8), "cls": np.tile(tokens.mean(axis=1), 8)}
        return {name: array[:, None].astype(np.float16) for name, array in arrays.items()}


def plan_of(store: str, index: Index, *, shard_rows: int, width: int = 24) -> Plan:
    """Both groups of the built-in encoders' shapes."""
    root = open_root(store)
    layout = StoreLayout(n_rows=len(index), views=("original",), resolution=RESOLUTION, shard_rows=shard_rows)
    specs = {LATENTS: registry.resolve_latents("tiny-vae"), FEATURES: registry.resolve_features("tiny-vit")}
    layouts = make_layouts(layout, width)
    groups = tuple(
        GroupPlan(spec=specs[path], layout=layouts[path], identity=identity)
        for path, identity in make_identities(width).items()
    )
    digests = {group.layout.path: group.identity.digest for group in groups}
    missing: dict[int, list[str]] = {}
    for group in groups:
        for unit, receipt, reason in scan(root, group.layout, digests[group.layout.path]):
            if receipt is None or reason is not None:
                missing.setdefault(unit, []).append(group.layout.path)
    return Plan(
        root=root,
        layout=layout,
        index=index,
        groups=groups,
        digests=digests,
        missing={unit: tuple(paths) for unit, paths in sorted(missing.items())},
        failed_before=0,
        free_bytes=float("inf"),
    )


def main(argv: Sequence[str]) -> int:
    store, options = argv[0], json.loads(argv[1])
    marks = {int(row): mark for row, mark in options.get("marks", {}).items()}
    source = Pictures(options["n"], marks, os.environ.get("FAKE_FLAGS", ""), options.get("read_s", 0.0))
    config = PrecomputeConfig(
        data="made-up",
        store=store,
        resolution=RESOLUTION,
        shard_rows=options["shard_rows"],
        ray_address=options.get("address", ""),
        **options.get("config", {}),
    )
    plan = plan_of(store, source.listing().index, shard_rows=config.shard_rows, width=options.get("width", 24))
    from pipeline.cluster.environment import prepare_ray

    address = prepare_ray(config.ray_address)
    from pipeline.cluster.connection import ray_cluster
    from pipeline.job import run_on_cluster

    with Staging(plan.root) as staging, ray_cluster(address, verbose=config.verbose):
        make_store = partial(create, plan, source, staging)
        outcome = run_on_cluster(config, plan, source, staging.run_id, make_store=make_store, encoder=NumpyEncoder)
    print("OUTCOME", json.dumps(dataclasses.asdict(outcome)))
    return 1 if outcome.given_up else 0


def command(store: Path, **options: Any) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "tests.pipeline.fakes", str(store), json.dumps(options)]


def outcome_of(stdout: str) -> dict[str, Any]:
    """What a run printed."""
    line = next(line for line in stdout.splitlines() if line.startswith("OUTCOME "))
    return dict(json.loads(line.removeprefix("OUTCOME ")))


if __name__ == "__main__":
    run_command(main, "fakes")
