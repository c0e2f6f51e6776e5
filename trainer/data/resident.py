"""Resident data (`--data.resident`): what a run reads, read once, and gathered from memory at each visit.

    ram    in the host's memory: one copy a machine, which its ranks share and read in equal parts (`ranks/machine.py`)
    gpu    in the memory of each rank's device: ranks read equal parts and hand them to each other, so that the store is
           read once; a batch is gathered by the device, behind the step before, and only row numbers cross to it

An array is (n·V, *row_shape), stored bytes, packed codes as they are; the sample of position p among the rows that did
not fail, view v, lies at slot p·V + v. Rows that failed take no memory. Batches are those of `rows.Streamed` bit for
bit.

Every chunk's checksum is compared while it is read. What does not fit into nine tenths of the memory that is free is
refused before anything is read; what the step itself will take of a GPU is not known then. Shared memory has no name,
and ends with the last process that maps it.

Cost: reading as from a cold store, once. After that a gather is one copy a row: `python -m benchmarks.resident`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from storage import ArrayReader, UserError, gather_into
from storage.base.console import progress_bar
from storage.prefetch import Prefetcher
from storage.reader import DEFAULT_THREADS
from storage.space import size
from storage.threads import Threads
from storage.visits import Visit
from trainer.config.data import DataConfig
from trainer.data.free_memory import free_memory
from trainer.data.groups import TrainingData
from trainer.data.rows import Arrays, Rows, Streamed, host_memory, torch_dtype
from trainer.ranks.machine import machine_of
from trainer.ranks.world import World

SHARE = 0.9  # of what is free
BLOCK_BYTES = 64 << 20  # read at once
MIN_SHARE_BYTES = 1 << 19  # less than this is not worth waking another thread for
SLOTS = "slots"


def open_rows(data: TrainingData, config: DataConfig, world: World, *, with_targets: bool) -> Rows:
    """Where a run's rows come from, as it asks. Every rank calls this.

    Raises UserError for data that does not fit, naming the sizes, and StoreError for what cannot be read.
    """
    readers = data.readers(with_targets=with_targets)
    if config.resident == "stream":
        return Streamed(readers)
    stored = _Stored(data, readers)
    if config.resident == "ram":
        return InRam(_read_into_ram(stored, world), stored, config.threads or DEFAULT_THREADS)
    return OnDevice(_read_onto_device(stored, world), stored)


class _Stored:
    """The samples that are read, and how they lie in memory."""

    def __init__(self, data: TrainingData, readers: Mapping[str, ArrayReader]) -> None:
        self.readers, self.valid_rows, self.n_views = readers, data.valid_rows, data.store.n_views
        self.n_rows = len(data.valid_rows)
        self.shapes = {name: (self.n_rows * self.n_views, *reader.row_shape) for name, reader in readers.items()}
        self.sizes_bytes = {
            name: int(np.prod(shape)) * readers[name].dtype.itemsize for name, shape in self.shapes.items()
        }
        self.n_bytes = sum(self.sizes_bytes.values())
        self.row_bytes = self.n_bytes // self.n_rows

    def read(self, positions: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """All views of the rows at `positions` int64 (B,), into (B·V, *row_shape)."""
        gather_into([(reader, out[name]) for name, reader in self.readers.items()], *self._visit(positions))

    def will_read(self, positions: np.ndarray) -> None:
        """Let the disk begin."""
        for reader in self.readers.values():
            reader.will_read(*self._visit(positions))

    def _visit(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.valid_rows.rows(positions)
        return np.repeat(rows, self.n_views), np.tile(np.arange(self.n_views), len(rows))

    def cut(self, positions: range) -> slice:
        """Their slots."""
        return slice(positions.start * self.n_views, positions.stop * self.n_views)

    def require_room(self, device: torch.device, kind: str) -> None:
        """Raise UserError, naming the sizes, unless all of it fits."""
        free = free_memory(device)
        if self.n_bytes > SHARE * free.n_bytes:
            parts = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in self.sizes_bytes.items())
            raise UserError(
                f"--data.resident {kind} takes {size(self.n_bytes)} for {self.n_rows:,} samples ({parts}), and "
                f"{free.of} has {size(free.n_bytes)} free, of which {SHARE:.0%} may be taken; leave --data.resident at "
                "stream, or derive features of fewer bits (python -m storage derive)"
            )


def _read_into_ram(stored: _Stored, world: World) -> Arrays:
    machine = machine_of(world)
    failure: Exception | None = None
    try:
        if machine.is_first:
            stored.require_room(torch.device("cpu"), "ram")
    except UserError as error:
        failure = error
    world.end_together(failure, "the data does not fit into another machine's memory, whose first rank says why")
    n_ranks = len(machine.ranks)
    *blocks, counts = machine.shared_memory([*stored.sizes_bytes.values(), 8 * n_ranks])
    arrays = {
        name: np.frombuffer(block, dtype=stored.readers[name].dtype).reshape(shape)
        for (name, shape), block in zip(stored.shapes.items(), blocks, strict=True)
    }
    done_bytes = np.frombuffer(counts, dtype=np.int64)  # of each rank
    bounds = [stored.n_rows * place // n_ranks for place in range(n_ranks + 1)]
    mine = range(bounds[machine.place], bounds[machine.place + 1])
    pieces = list(_pieces(mine, max(1, BLOCK_BYTES // stored.row_bytes)))
    with _bar(stored, world) as bar:
        try:
            for piece, following in pairwise([*pieces, range(0)]):
                stored.will_read(np.asarray(following, dtype=np.int64))
                out = {name: array[stored.cut(piece)] for name, array in arrays.items()}
                stored.read(np.asarray(piece), out)
                done_bytes[machine.place] += len(piece) * stored.row_bytes
                bar.update(int(done_bytes.sum()) - bar.n)
        except (UserError, OSError) as error:
            failure = error
        world.end_together(failure, "another rank could not read its part of the data, and says why")
        bar.update(stored.n_bytes - bar.n)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read_onto_device(stored: _Stored, world: World) -> Arrays:
    failure: Exception | None = None
    try:
        stored.require_room(world.device, "gpu")
    except UserError as error:
        failure = error
    world.end_together(failure, "the data does not fit into another rank's device, and that rank says why")
    arrays = {
        name: torch.empty(shape, dtype=torch_dtype(stored.readers[name].dtype), device=world.device)
        for name, shape in stored.shapes.items()
    }
    n_each = max(1, min(BLOCK_BYTES // stored.row_bytes, stored.n_rows) // world.size)  # rows a rank reads of a round
    rounds = list(_pieces(range(stored.n_rows), n_each * world.size))

    def part(of: range) -> np.ndarray:
        """This rank's positions of a round; the last row stands in for those beyond the last."""
        first = of.start + world.rank * n_each
        return np.minimum(np.arange(first, first + n_each), stored.n_rows - 1)

    def read(of: range, buffers: Arrays) -> tuple[range, Arrays]:
        stored.read(part(of), {name: tensor.numpy() for name, tensor in buffers.items()})
        return of, buffers

    pinned = world.device.type == "cuda"
    ring = [
        {
            name: host_memory((n_each * stored.n_views, *reader.row_shape), reader.dtype, pinned=pinned)
            for name, reader in stored.readers.items()
        }
        for _ in range(2)
    ]
    ahead: Prefetcher[range, Arrays, tuple[range, Arrays]]
    with (
        _bar(stored, world) as bar,
        Prefetcher(rounds, lambda of: stored.will_read(part(of)), read, ring=ring, name="resident") as ahead,
    ):
        for of in rounds:
            try:
                item = ahead.next()
            except (UserError, OSError) as error:
                failure = error
            world.end_together(failure, "another rank could not read its part of the data, and says why")
            assert item is not None
            cut = stored.cut(of)
            for name, tensor in item[1].items():
                whole = world.gather(_as_bytes(tensor.to(world.device)))
                _as_bytes(arrays[name])[cut] = whole[: cut.stop - cut.start]
            ahead.give_back(item[1])
            bar.update(len(of) * stored.row_bytes)
    return arrays


def _pieces(positions: range, n: int) -> Iterator[range]:
    """Consecutive ranges of `n`, the last one shorter."""
    return (positions[i : i + n] for i in range(0, len(positions), n))


def _bar(stored: _Stored, world: World) -> tqdm[NoReturn]:
    return progress_bar(
        stored.n_bytes, unit="B", unit_scale=True, description="read into memory", hidden=not world.is_main
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as numbers that every collective takes."""
    return tensor.view(torch.uint8)


class _Resident:
    """What both kinds share."""

    def __init__(self, arrays: Arrays, stored: _Stored) -> None:
        self._arrays, self._valid_rows, self._n_views = arrays, stored.valid_rows, stored.n_views

    def slots(self, visit: Visit) -> np.ndarray:
        """Int64 (B,)."""
        return self._valid_rows.positions(visit.rows) * self._n_views + visit.views

    def will_read(self, visit: Visit) -> None:
        """Nothing is to be done ahead."""

    def keep(self, names: Collection[str]) -> None:
        """The memory of the others is free when every rank has come here."""
        self._arrays = {name: array for name, array in self._arrays.items() if name in names}

    def close(self) -> None:
        """Let all go."""
        self._arrays = {}


class InRam(_Resident):
    """Gathered by `n_threads` of the host into a loader's buffers, as from a store."""

    def __init__(self, arrays: Arrays, stored: _Stored, n_threads: int) -> None:
        super().__init__(arrays, stored)
        self._threads = Threads(n_threads, "gather-resident")

    def buffers(self, n: int, *, pinned: bool) -> Arrays:
        """One an array."""
        return {
            name: torch.empty((n, *array.shape[1:]), dtype=array.dtype, pin_memory=pinned)
            for name, array in self._arrays.items()
        }

    def gather(self, visit: Visit, buffers: Arrays) -> None:
        """Each thread takes a part of the rows, of every array."""
        slots = self.slots(visit)
        pairs = [(array.numpy(), buffers[name].numpy()) for name, array in self._arrays.items()]
        n_bytes = sum(out.nbytes for _, out in pairs)
        n_shares = max(1, min(self._threads.n, n_bytes // MIN_SHARE_BYTES, len(slots)))
        bounds = [len(slots) * i // n_shares for i in range(n_shares + 1)]
        self._threads.share(partial(_take, pairs, slots), [slice(*cut) for cut in pairwise(bounds)])

    def on_device(self, copied: Arrays) -> Arrays:
        """As they are."""
        return copied

    def close(self) -> None:
        """Let all go, and end the threads."""
        super().close()
        self._threads.close()


def _take(pairs: list[tuple[np.ndarray, np.ndarray]], slots: np.ndarray, cut: slice) -> None:
    for array, out in pairs:  # "clip": with "raise" numpy would gather into memory of its own first
        np.take(array, slots[cut], axis=0, out=out[cut], mode="clip")


class OnDevice(_Resident):
    """Gathered by the device; a loader's buffers hold slots."""

    def buffers(self, n: int, *, pinned: bool) -> Arrays:
        """Where the rows lie."""
        return {SLOTS: host_memory((n,), np.dtype(np.int64), pinned=pinned)}

    def gather(self, visit: Visit, buffers: Arrays) -> None:
        """The slots."""
        buffers[SLOTS].numpy()[:] = self.slots(visit)

    def on_device(self, copied: Arrays) -> Arrays:
        """Copies, made by the stream that computes."""
        return copied | {name: array.index_select(0, copied[SLOTS]) for name, array in self._arrays.items()}
