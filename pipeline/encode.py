"""The encoding actor: holds the models of a run, encodes a unit for every group that lacks it, and publishes it.

Models are loaded on the first call, on the machine where they run, and stay. Two calls may be in hand: while one
publishes (CRC, writing, fsync), the next one encodes. Batches are cut from the rows that decoded, in row order, so that
a unit is always encoded in the same batches and comes out the same bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.encoders import registry
from pipeline.plan import GroupPlan
from pipeline.transforms import hflip
from storage import Failure, publish_unit
from storage.codec import refusal, unquantisable

CALLS_IN_HAND = 2  # one encoding, one publishing


class UnitEncoder:
    """Encodes and publishes units. Made in the actor's process; knows nothing of Ray."""

    def __init__(
        self, root: Path, groups: Sequence[GroupPlan], digests: dict[str, str], batch: int, n_threads: int, run_id: str
    ) -> None:
        self._root, self._groups, self._digests = root, {group.layout.path: group for group in groups}, digests
        self._batch, self._n_threads, self._run_id = batch, n_threads, run_id
        self._encoders: dict[str, registry.Encoder] = {}
        self._encoding = threading.Lock()

    def ready(self) -> str:
        """Load every model; returns the device's name."""
        import torch

        torch.set_num_threads(self._n_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self._encoding:
            for path, group in self._groups.items():
                if path not in self._encoders:
                    self._encoders[path] = registry.load(
                        group.spec, resolution=group.layout.store.resolution, device=device
                    )
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def encode_and_publish(
        self, unit: int, images: np.ndarray, failures: Sequence[Failure], decode_s: float, paths: Sequence[str]
    ) -> float:
        """Encode `images` uint8 (n, H, W, 3) for the groups `paths` and publish the unit in each; returns seconds."""
        self.ready()
        start_s = time.perf_counter()
        for path in paths:
            group = self._groups[path]
            rows = group.layout.store.unit_rows(unit)
            failed = {failure.row - rows.start for failure in failures}
            present = np.array([i for i in range(len(rows)) if i not in failed], dtype=np.int64)
            with self._encoding:
                encode_start_s = time.perf_counter()
                arrays = self._encode(path, unit, images, present)
                encode_s = time.perf_counter() - encode_start_s
            timings_s = {"decode": round(decode_s, 4), "encode": round(encode_s, 4)}
            publish_unit(self._root, group.layout, self._digests[path], unit, arrays, failures, self._run_id, timings_s)
        return time.perf_counter() - start_s

    def _encode(self, path: str, unit: int, images: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays (n, V, *row_shape) by name; rows that are not in `present` stay zero and are not stored.

        Raises UserError naming the row and token that cannot be quantised.
        """
        layout = self._groups[path].layout
        arrays = {a.name: np.zeros((len(images), *a.shape[1:]), dtype=a.dtype) for a in layout.arrays}
        for view, name in enumerate(layout.store.views):
            for start in range(0, len(present), self._batch):
                rows = present[start : start + self._batch]
                batch = images[rows]
                if name == "hflip":
                    batch = hflip(batch)
                encoded = self._encoders[path].encode(batch)
                # Assigning would cast, float16 tokens to int8 say, without a word.
                assert {a.name: np.dtype(a.dtype) for a in layout.arrays} == {k: v.dtype for k, v in encoded.items()}
                for array, values in encoded.items():
                    arrays[array][rows, view] = values
        if "scale" in arrays:
            _refuse_unquantisable(path, arrays["scale"], layout.store.unit_rows(unit).start)
        return arrays


def _refuse_unquantisable(path: str, scale: np.ndarray, first_row: int) -> None:
    """Raise UserError naming row and token when a factor of scale (n, V, T, G) is not finite."""
    bad = unquantisable(scale)
    if bad is not None:
        i, view, token = bad
        raise refusal(f"{path}, row {first_row + i}, view {view}: token {token}")
