"""Stage one from end to end in this process: the real command but for Ray and the encoders' arithmetic."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.cluster.environment import prepare_ray
from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.encode import Block, UnitEncoder
from pipeline.failures import refuse_too_many
from pipeline.plan import Plan
from pipeline.sources import Source
from storage.base.console import Stop
from storage.base.errors import UserError


class PixelEncoder(UnitEncoder):
    """Pixels, repeated to the arrays' shapes; which images stand in a batch shows in none of them."""

    def load(self) -> str:
        return "cpu"

    def encode(
        self, path: str, images: np.ndarray, present: np.ndarray, batch: int, first_row: int, *_: object
    ) -> dict[str, np.ndarray]:
        pixels = images[:, ::8, ::8].reshape(len(images), -1).astype(np.float16)
        arrays = self._groups[path].layout.arrays
        return {
            a.name: np.stack([np.resize(row, a.shape[1:]) for row in pixels]).reshape(len(images), *a.shape[1:])
            for a in arrays
        }


def run_on_cluster(
    config: PrecomputeConfig, plan: Plan, source: Source, run_id: str, *, make_store: Callable[[], None], stop: Stop
) -> Any:
    """`pipeline.job.run_on_cluster`, a unit after the other."""
    from pipeline.job import Outcome  # imports Ray, whose environment other tests settle before

    encoder = PixelEncoder(plan.root, plan.groups, plan.digests, config.batch, 1, run_id)
    make_store()
    n_failed = plan.failed_before
    for unit, paths in plan.missing.items():
        rows = plan.layout.unit_rows(unit)
        samples = plan.index.slice(rows)
        images, (failures, timings_s, crcs) = decode_unit(
            source, rows.start, samples.keys, samples.locations, config.resolution
        )
        redo = plan.redo.get(unit, ())
        block = Block(unit=unit, failures=failures, timings_s=timings_s, paths=paths, crcs=crcs, redo=redo)
        encoder.encode_and_publish(images, block, time.time())
        n_failed += len(failures)
        refuse_too_many(n_failed, len(plan.index), config.max_failures, plan.root)
    return Outcome(
        n_images=plan.n_images_missing, n_failed=n_failed, seconds=1.0, given_up={}, device="cpu", encoder_busy=0.0,
        bound="", store_peak_bytes=0,
    )  # fmt: skip


OPTIONS = "--latents tiny-vae --features tiny-vit --resolution 128".split()
Precompute = Callable[..., str]


@pytest.fixture
def precompute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Precompute:
    """`precompute(data, store, *options, shard_rows=4)`: what it printed, or the line that it was refused with."""
    monkeypatch.setattr("pipeline.precompute.prepare_ray", lambda address: "")
    prepare_ray("")  # before Ray is imported, for the tests that come after
    monkeypatch.setattr("pipeline.cluster.connection.ray_cluster", lambda address, **options: contextlib.nullcontext())
    monkeypatch.setattr("pipeline.job.run_on_cluster", run_on_cluster)

    def command(data: Path | str, store: Path, *more: Any, shard_rows: int = 4) -> str:
        capsys.readouterr()
        line = ["precompute", "--json", "--data", str(data), "--store", str(store), "--shard-rows", str(shard_rows)]
        try:
            status = main([*line, *OPTIONS, *map(str, more)])
        except UserError as error:
            return f"refused: {error}"
        assert status == 0
        return capsys.readouterr().out

    return command
