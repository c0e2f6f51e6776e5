"""Stage one from end to end in this process: the real command but for Ray and the encoders' arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.without_ray import run_here
from pipeline.__main__ import main
from pipeline.cluster.environment import prepare_ray
from pipeline.encode import UnitEncoder
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


OPTIONS = "--latents tiny-vae --features tiny-vit --resolution 128".split()
Precompute = Callable[..., str]


@pytest.fixture
def precompute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Precompute:
    """`precompute(data, store, *options, shard_rows=4)`: what it printed, or the line that it was refused with."""
    monkeypatch.setattr("pipeline.precompute.prepare_ray", lambda address: "")
    prepare_ray("")  # before Ray is imported, for the tests that come after
    monkeypatch.setattr("pipeline.cluster.connection.ray_cluster", lambda address, **options: contextlib.nullcontext())
    monkeypatch.setattr("pipeline.job.run_on_cluster", partial(run_here, encoder=PixelEncoder))

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
