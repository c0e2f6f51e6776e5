"""Batches in the order of training, gathered by a background thread while the model computes.

A ring of preallocated buffers (pinned for CUDA) is filled ahead of the step; moments and features of a sample are
always of the same row and view. The state of the loader is the step: global batch b holds fixed rows whatever the
number of ranks, and a rank gathers its part only. An error in the thread is raised in the consumer.

Quantised features are copied as int8 and factors, and become float32 on the device.

Cost: `prefetch` batches of host memory; no copy on the CPU beyond the gather itself, one asynchronous copy to a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage import ArrayReader, gather_into
from storage.order import Order, rank_slice
from trainer import random_keys
from trainer.data import TrainingData
from trainer.dequantise import dequantise


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's part of a global batch, on the training device, valid until the next one is asked for."""

    step: int
    rows: Tensor  # int64 (B,)
    labels: Tensor  # int64 (B,)
    moments: Tensor  # float16 (B, 2C, h, w), or (B, C, h, w) of a deterministic autoencoder
    targets: tuple[Tensor, ...]  # one an alignment target: float16 (B, T, D), or float32 from int8 and factors
    stall_s: float  # how long the consumer waited for it


class Loader:
    """Iterates over the batches of steps [start, stop). Use as a context manager, which ends the thread."""

    def __init__(
        self,
        data: TrainingData,
        *,
        seed: int,
        batch: int,
        start: int,
        stop: int,
        rank: int,
        world_size: int,
        device: torch.device,
        prefetch: int,
    ) -> None:
        self._data, self._seed, self._batch = data, seed, batch
        self._steps = range(start, stop)
        self._slice = rank_slice(batch, rank, world_size)
        self._order = Order(data.n_samples, seed)
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        readers = {"moments": data.latents["moments"]}
        for group in data.features:  # two targets may share a group, which is then read once
            for name in ("patches", "scale") if group.path in data.codecs else ("patches",):
                readers[f"{group.path}/{name}"] = group[name]
        self._readers = readers
        share = batch // world_size
        self._free: queue.Queue[dict[str, Tensor]] = queue.Queue()
        for _ in range(prefetch + 1):  # one more is in the consumer's hands
            self._free.put(
                {name: _buffer(reader, share, pinned=self._copies is not None) for name, reader in readers.items()}
            )
        self._ready: queue.Queue[tuple[int, np.ndarray, dict[str, Tensor]] | BaseException | None] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._gather_all, name="loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        held: dict[str, Tensor] | None = None
        copied: Any = None
        while True:
            if held is not None:
                if copied is not None:
                    copied.synchronize()
                self._free.put(held)
            start_s = time.perf_counter()
            item = self._ready.get()
            stall_s = time.perf_counter() - start_s
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            step, rows, held = item
            on_device, copied = self._to_device(held)
            yield Batch(
                step=step,
                rows=torch.from_numpy(rows).to(self._device),
                labels=torch.from_numpy(self._data.labels[rows]).to(self._device),
                moments=on_device["moments"],
                targets=self._targets(on_device),
                stall_s=stall_s,
            )

    def _to_device(self, buffers: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        if self._copies is None:
            return buffers, None
        with torch.cuda.stream(self._copies):
            on_device = {name: buffer.to(self._device, non_blocking=True) for name, buffer in buffers.items()}
            copied = torch.cuda.Event()
            copied.record()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in on_device.values():
            tensor.record_stream(current)
        return on_device, copied

    def _targets(self, on_device: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The patch tokens of each alignment target."""
        tokens = {group.path: on_device[f"{group.path}/patches"] for group in self._data.features}
        for path, codec in self._data.codecs.items():
            tokens[path] = dequantise(tokens[path], on_device[f"{path}/scale"], codec)
        return tuple(tokens[group.path] for group in self._data.features)

    def _gather_all(self) -> None:
        try:
            for step in self._steps:
                rows, views = self._samples(step)
                buffers = self._take_free()
                if buffers is None:
                    return
                if step + 1 in self._steps:  # the disk fetches the next batch while this one is copied
                    next_rows, next_views = self._samples(step + 1)
                    for reader in self._readers.values():
                        reader.will_read(next_rows, next_views)
                targets = [(reader, buffers[name].numpy()) for name, reader in self._readers.items()]
                gather_into(targets, rows, views)
                self._ready.put((step, rows, buffers))
            self._ready.put(None)
        except BaseException as error:  # raised again where the batch was asked for
            self._ready.put(error)

    def _take_free(self) -> dict[str, Tensor] | None:
        while not self._stopping.is_set():
            try:
                return self._free.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def _samples(self, step: int) -> tuple[np.ndarray, np.ndarray | int]:
        """Rows int64 (B,) and views of this rank's part of a global batch."""
        rows = self._order.global_batch(step, self._batch)[self._slice]
        if self._data.valid_rows is not None:
            rows = self._data.valid_rows[rows]
        return rows, self._views(step, rows)

    def _views(self, step: int, rows: np.ndarray) -> np.ndarray | int:
        n_views = self._data.store.n_views
        if n_views == 1:
            return 0
        draws = random_keys.uniform(self._seed, "view", step, torch.from_numpy(rows))
        return (draws * n_views).long().numpy()


def _buffer(reader: ArrayReader, n: int, *, pinned: bool) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, dtype=reader.dtype)).dtype
    return torch.empty((n, *reader.row_shape), dtype=dtype, pin_memory=pinned)
