"""Batches in the order of training, gathered by a background thread while the model computes.

A ring of preallocated buffers (pinned for CUDA) is filled ahead of the step (`storage/prefetch.py`) with rows of the
store (`rows.py`) or of memory (`resident.py`); moments and features of a sample are always of the same row and view.
The state of the loader is the step, which is epoch and position in one: global batch b holds fixed rows whatever the
number of ranks, and a rank gathers its part only.

On CUDA nothing here makes the host wait for the step that is under way: rows, labels and arrays are copied from pinned
memory on a stream of their own, and the computing stream waits for the copy. A buffer returns to the ring when its copy
is done; a copy's memory on the device is held by the allocator until the computing stream has passed its last use
(`record_stream`). Features are copied as they are stored, packed codes too, and become numbers on the device.

Cost: `prefetch` + 1 batches of host memory, two or three of device memory; no copy on the CPU beyond the gather itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.prefetch import Prefetcher
from storage.torch.codecs import Tokens, twin_of
from storage.visits import Visit, Visits
from trainer.data.feature_latents import CLASS_TOKEN, on_grid
from trainer.data.groups import TrainingData
from trainer.data.rows import Rows, Streamed


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's part of a global batch, on the training device, valid until the next one is asked for."""

    step: int
    rows: Tensor  # int64 (B,)
    labels: Tensor  # int64 (B,)
    moments: Tensor  # (B, 2C, h, w), or (B, C, h, w) of a deterministic autoencoder, float16, or of features as targets
    targets: tuple[Tokens, ...]  # one an alignment target: (B, T, D), float16, or float32 where they were in a codec
    stall_s: float  # how long the step waited for it
    class_tokens: Tensor | None = None  # float16 (B, D), of a model that denoises these too

    def split(self, n: int) -> list[Batch]:
        """`n` equal consecutive parts, sharing memory; the first answers for the stall."""
        size = len(self.rows) // n
        assert size * n == len(self.rows), (len(self.rows), n)
        cuts = [slice(i * size, (i + 1) * size) for i in range(n)]
        return [
            Batch(
                step=self.step,
                rows=self.rows[cut],
                labels=self.labels[cut],
                moments=self.moments[cut],
                targets=tuple(target.each(itemgetter(cut)) for target in self.targets),
                stall_s=0.0 if cut.start else self.stall_s,
                class_tokens=self.class_tokens[cut] if self.class_tokens is not None else None,
            )
            for cut in cuts
        ]


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """A batch on the host. `buffers` are of the ring; `index` holds rows and labels in memory of their own."""

    step: int
    index: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Loader:
    """Iterates over the batches of steps [start, stop). Use as a context manager, which ends the thread.

    `rows` are where the arrays come from, the store unless said; whoever opened them closes them. Without
    `with_targets` there are no patch tokens, which `rows` then lack; `compiled`, codes are decoded by compiled code.
    `on_wait` is called about once a second, with the seconds so far, while a batch is waited for.
    """

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
        rows: Rows | None = None,
        with_targets: bool = True,
        compiled: bool = False,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._data, self._device = data, device
        self._on_wait = on_wait
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._aligned = data.features if with_targets else ()
        self._rows = rows or Streamed(data.readers(with_targets=with_targets))
        decoded = (*self._aligned, *((data.latents,) if data.of_features else ()))
        self._decoders = {
            group.path: (group.codec_arrays, twin_of(group.codec, compiled=compiled).decode) for group in decoded
        }
        share = batch // world_size
        visits = Visits(
            data.valid_rows, n_views=data.store.n_views, seed=seed, batch=batch, rank=rank, world_size=world_size
        )
        self._ahead = Prefetcher(
            map(visits.of, range(start, stop)),
            self._rows.will_read,
            self._gather,
            ring=[  # one more is in the consumer's hands
                self._rows.buffers(share, pinned=self._copies is not None) for _ in range(prefetch + 1)
            ],
            name="loader",
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.close()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item, stall_s = self._next()
            if item is None:
                return
            arrived, copied = self._to_device({**item.index, **item.buffers})
            on_device = self._rows.on_device(arrived)
            tokens = self._tokens(on_device)
            of_class = self._data.class_tokens
            yield Batch(
                step=item.step,
                rows=on_device["rows"],
                labels=on_device["labels"],
                moments=self._latents(on_device, tokens),
                targets=self._targets(on_device, tokens),
                stall_s=stall_s,
                class_tokens=None if of_class is None else on_device[f"{of_class.path}/{CLASS_TOKEN}"],
            )
            if copied is not None:
                copied.synchronize()
            self._ahead.give_back(item.buffers)

    def _next(self) -> tuple[_Gathered | None, float]:
        """What the thread made next, and how long the step waited for it.

        A wait that the device did not notice, since it had the steps before to finish, is none; one that it noticed
        counts from when the host began to wait, which may be a little too long.
        """
        enqueued = torch.cuda.current_stream(self._device).record_event() if self._copies is not None else None
        start_s = time.perf_counter()
        item = self._ahead.next(self._on_wait)
        waited_s = time.perf_counter() - start_s
        return item, waited_s if enqueued is None or enqueued.query() else 0.0

    def _to_device(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        if self._copies is None:
            return tensors, None
        with torch.cuda.stream(self._copies):
            on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
            copied = torch.cuda.Event()
            copied.record()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in on_device.values():
            tensor.record_stream(current)
        return on_device, copied

    def _tokens(self, on_device: dict[str, Tensor]) -> dict[str, Tokens]:
        """The patch tokens of each group that has any."""
        tokens: dict[str, Tokens] = {}
        for path, (names, decode) in self._decoders.items():
            arrays = {name: on_device[f"{path}/{name}"] for name in names}
            tokens[path] = decode(arrays, on_device["rows"], on_device["views"])
        return tokens

    def _latents(self, on_device: dict[str, Tensor], tokens: dict[str, Tokens]) -> Tensor:
        """Moments as they are stored, or features on their grid."""
        if not self._data.of_features:
            return on_device["moments"]
        latents = self._data.latents
        return on_grid(tokens[latents.path].values, latents.identity.token_grid)

    def _targets(self, on_device: dict[str, Tensor], tokens: dict[str, Tokens]) -> tuple[Tokens, ...]:
        """The patch tokens of each alignment target, behind its class token where REG has it so."""
        if not self._data.aligns_class_tokens:
            return tuple(tokens[group.path] for group in self._aligned)
        behind = {path: behind_class_token(of, on_device[f"{path}/{CLASS_TOKEN}"]) for path, of in tokens.items()}
        return tuple(behind[group.path] for group in self._aligned)

    def _gather(self, visit: Visit, buffers: dict[str, Tensor]) -> _Gathered:
        if self._copies is not None:
            torch.cuda.set_device(self._device)  # a thread's own setting: pinning would open a context on GPU 0
        self._rows.gather(visit, buffers)
        return _Gathered(step=visit.number, index=self._index(visit), buffers=buffers)

    def _index(self, visit: Visit) -> dict[str, Tensor]:
        labels = self._data.labels[visit.rows].astype(np.int64)
        views = np.broadcast_to(np.int64(visit.views), visit.rows.shape).copy()
        numbers = {"rows": visit.rows, "labels": labels, "views": views}
        index = {name: torch.from_numpy(of) for name, of in numbers.items()}
        return index if self._copies is None else {name: tensor.pin_memory() for name, tensor in index.items()}


def behind_class_token(tokens: Tokens, class_token: Tensor) -> Tokens:
    """Patch tokens with the class token (B, D), which is exact, before them."""
    values = torch.cat([class_token.unsqueeze(1).to(tokens.values.dtype), tokens.values], dim=1)
    if tokens.norms is None or tokens.variance is None:
        return tokens._replace(values=values)
    norm = torch.linalg.vector_norm(class_token.float(), dim=-1, keepdim=True)
    return tokens._replace(
        values=values,
        norms=torch.cat([norm, tokens.norms], dim=1),
        variance=torch.cat([torch.zeros_like(norm), tokens.variance], dim=1),
    )
