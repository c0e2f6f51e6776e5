"""The encoding actor: holds the models of a run, encodes a unit for every group that lacks it, and publishes it.

Models are loaded on the first call, on the machine where they run, and stay. Encoding is one at a time; publishing
(statistics, CRC, writing, fsync) runs on threads beside it, so the next group, or the next of the two units in hand, is
encoded meanwhile. So do copies: a unit goes to the GPU before its turn, and what was made of it leaves afterwards, on a
stream of their own, and the thread that waits for a copy is not the one that encodes. Memory: images and arrays of
CALLS_IN_HAND units, on the host and on the GPU.

Batches are cut from the rows that decoded, in row order, so that a unit is always encoded in the same batches and comes
out the same bytes; a compiled encoder is always given whole ones, filled up with the last image, and so is compiled for
one shape. When a GPU runs out of memory the batch is halved for good and the unit begun again, so one unit is of one
batch size; sums in float arithmetic may differ in the last bit from those of another, so the receipt names it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.encoders import registry
from pipeline.plan import GroupPlan
from storage import Failure, publish_unit
from storage.base.errors import UserError
from storage.codecs import TOKENS, codec_of
from storage.receipts import Receipt, look_at
from storage.roots import Root, open_root
from storage.samples import group_paths, is_of_samples, refuse_lost_rows, refuse_other_samples
from storage.statistics import unit_sums

if TYPE_CHECKING:
    import torch

    from storage.torch.codecs import Twin

CALLS_IN_HAND = 2  # one encoding, one publishing
WIDTH = 2  # axis of images (B, H, W, 3)
Array: TypeAlias = "np.ndarray | torch.Tensor"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoded unit as it is handed over, beside its images: what failed, what it took, which groups lack it.

    `crcs` uint32 (n,) are of its samples' bytes. `redo` are those of `paths` that do the unit again though it is done.
    """

    unit: int
    failures: Sequence[Failure]
    timings_s: Mapping[str, float]
    paths: Sequence[str]
    crcs: np.ndarray | None = None
    redo: Sequence[str] = ()


class UnitEncoder:
    """Encodes and publishes units. Made in the actor's process; knows nothing of Ray."""

    def __init__(
        self,
        root: Root | os.PathLike[str],
        groups: Sequence[GroupPlan],
        digests: Mapping[str, str],
        batch: int,
        n_threads: int,
        run_id: str,
        *,
        needs_gpu: bool = False,
    ) -> None:
        """`needs_gpu`: one was set aside for it, so that having to do without is an error."""
        self._needs_gpu = needs_gpu
        self._root, self._digests = open_root(root), digests
        self._groups = {group.layout.path: group for group in groups}
        self._n_threads, self._run_id = n_threads, run_id
        self._batch = dict.fromkeys(self._groups, batch)
        self._encoders: dict[str, registry.Encoder] = {}
        self._twins: dict[str, Twin[Any]] = {}
        self._device = ""
        self._copying: torch.cuda.Stream | None = None  # on a GPU
        self._encoding = threading.Lock()
        self._shares: dict[int, float] = {}  # of units in hand: how much of the encoding is done
        self._publishers = ThreadPoolExecutor(CALLS_IN_HAND, thread_name_prefix="publish")

    def ready(self) -> str:
        """Load every model; returns the device's name."""
        if not self._device:
            with self._encoding:
                self._device = self._device or self.load()
        return self._device

    def shares(self) -> dict[int, float]:
        """Unit → share in [0, 1] of its encoding that is done (on a GPU: queued), of the units in hand."""
        return dict(self._shares)

    def load(self) -> str:
        """Load every model onto the device; returns its name. Raises UserError when a GPU that was promised is none."""
        import torch

        torch.set_num_threads(self._n_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._needs_gpu and device.type == "cpu":
            raise UserError(
                f"a GPU was set aside for this encoder and torch {torch.__version__} sees none; mend the driver, "
                "install the torch that fits it, or start Ray with --num-gpus 0"
            )
        for path, group in self._groups.items():
            if path not in self._encoders:
                self._encoders[path] = registry.load(
                    group.spec, resolution=group.layout.store.resolution, device=device
                )
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def encode_and_publish(self, images: np.ndarray, block: Block, sent_unix_s: float) -> float:
        """Encode `images` uint8 (n, H, W, 3) for the block's groups and publish the unit in each.

        Returns the seconds spent encoding. A group in which another run published the unit meanwhile is left alone.
        `sent_unix_s` dates the hand-over; between machines it is off by what their clocks differ. Raises UserError when
        the unit's images are others than those that a group of the store was made of.
        """
        self._shares[block.unit] = 0.0
        try:
            return self._encode_and_publish(images, block, max(0.0, time.time() - sent_unix_s))
        finally:
            self._shares.pop(block.unit, None)

    def _encode_and_publish(self, images: np.ndarray, block: Block, hand_over_s: float) -> float:
        device = self.ready()
        self._refuse_other_samples(block)
        published: list[Future[None]] = []
        encoding_s = 0.0
        uploaded = self._upload_if_it_fits(images)
        with self._encoding:
            pixels = self.upload(images) if uploaded is None else uploaded
            for i, path in enumerate(block.paths):
                self._shares[block.unit] = i / len(block.paths)
                before, done = look_at(self._root, self._groups[path].layout, block.unit, self._digests[path])
                if done and (path not in block.redo or is_of_samples(before, block.crcs, block.failures)):
                    continue
                if before is not None and (done or not before.shards):
                    refuse_lost_rows(self._root, path, before, block.failures)
                else:
                    before = None
                start_s = time.perf_counter()
                arrays, present = self._encode_unit(path, pixels, block)
                encode_s = time.perf_counter() - start_s
                encoding_s += encode_s
                timings_s = {**block.timings_s, "hand_over": hand_over_s, "encode": encode_s}
                made = {"device": device, "batch": self._batch[path]}
                published.append(
                    self._publishers.submit(self._publish, path, block, arrays, present, timings_s, made, before)
                )
        for future in published:
            future.result()
        return encoding_s

    def upload(self, images: np.ndarray) -> Array:
        """The images where they are encoded. On a GPU they are all there when this returns."""
        if self._copying is None:
            return images
        import torch

        encoding = torch.cuda.default_stream(self._copying.device)
        with torch.cuda.stream(self._copying):
            pixels = torch.tensor(images, device=self._copying.device)
        _wait_for(self._copying)
        pixels.record_stream(encoding)  # its memory is not for the next upload before that stream has read it
        return pixels

    def _upload_if_it_fits(self, images: np.ndarray) -> Array | None:
        """None when the unit that is being encoded leaves no room: then it is this one's turn first."""
        try:
            return self.upload(images)
        except RuntimeError as error:
            if not _out_of_gpu_memory(error):
                raise
        return None

    def _download(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """The arrays on the host. What made them is done, so the stream of the copies need not wait for it."""
        if self._copying is None:
            return registry.to_host(arrays)
        import torch

        with torch.cuda.stream(self._copying):
            return registry.to_host(arrays)

    def _publish(
        self,
        path: str,
        block: Block,
        encoded: Mapping[str, Array],
        present: np.ndarray,
        timings_s: Mapping[str, float],
        made: Mapping[str, object],
        replaces: Receipt | None = None,
    ) -> None:
        group = self._groups[path]
        arrays = self._download(encoded)
        first_row = group.layout.store.unit_rows(block.unit).start
        codec = codec_of(group.identity)
        if TOKENS in arrays and (bad := codec.unencodable(arrays)) is not None:
            i, view, token = bad
            raise codec.refusal(f"{path}, row {first_row + i}, view {view}: token {token}")
        self._refuse_other_samples(block)  # again: another run may have published meanwhile
        start_s = time.perf_counter()
        sums = unit_sums(group.layout, arrays, present, codec, first_row)
        if not all(np.isfinite(of.squares).all() for of in sums.values()):  # they have seen every number
            registry.refuse_infinite(arrays, lambda i: f"{path}, row {first_row + i},")
        timings_s = {**timings_s, "statistics": time.perf_counter() - start_s}
        publish_unit(
            self._root,
            group.layout,
            self._digests[path],
            block.unit,
            arrays,
            block.failures,
            self._run_id,
            {stage: round(seconds, 4) for stage, seconds in timings_s.items()},
            statistics={name: of.packed() for name, of in sums.items()},
            made=made,
            sample_crc32c=block.crcs,
            replaces=replaces,
        )
        self._refuse_other_samples(block)  # of two runs that publish at once, the later one finds out

    def _refuse_other_samples(self, block: Block) -> None:
        if block.crcs is not None:
            paths = {*group_paths(self._root), *self._groups}
            failed = [failure.row for failure in block.failures]
            refuse_other_samples(self._root, sorted(paths), block.unit, block.crcs, failed)

    def _encode_unit(self, path: str, images: Array, block: Block) -> tuple[Mapping[str, Array], np.ndarray]:
        """(arrays (n, V, *row_shape) by name, positions of the rows that decoded), in batches that the memory holds."""
        first_row = self._groups[path].layout.store.unit_rows(block.unit).start
        failed = {failure.row - first_row for failure in block.failures}
        present = np.array([i for i in range(len(images)) if i not in failed], dtype=np.int64)
        before = self._shares.get(block.unit, 0.0)

        def note(share: float) -> None:
            self._shares[block.unit] = before + share / len(block.paths)

        while True:
            try:
                arrays = self.encode(path, images, present, self._batch[path], first_row, note)
                break
            except RuntimeError as error:
                if not _out_of_gpu_memory(error) or self._batch[path] == 1:
                    raise
                self._batch[path] //= 2
            _release_gpu_memory()  # outside the handler, whose traceback holds the batch
        return arrays, present

    def encode(
        self,
        path: str,
        images: Array,
        present: np.ndarray,
        batch: int,
        first_row: int,
        on_batch: Callable[[float], None] = lambda share: None,
    ) -> Mapping[str, Array]:
        """Arrays (n, V, *row_shape) by name, where `images` are; rows that are not in `present` stay zero, not stored.

        The images are those of rows from `first_row`. `on_batch` is told the share that is done, in (0, 1], after every
        batch. The arrays are complete when this returns.
        """
        import torch

        group = self._groups[path]
        layout = group.layout
        device = torch.device("cpu") if isinstance(images, np.ndarray) else images.device
        dtypes = {a.name: torch.from_numpy(np.empty(0, dtype=a.dtype)).dtype for a in layout.arrays}
        arrays = {
            a.name: torch.zeros((len(images), *a.shape[1:]), dtype=dtypes[a.name], device=device) for a in layout.arrays
        }
        rows_present = torch.from_numpy(present).to(device)  # once: the GPU would run dry at a copy every batch
        twin = self._twin(group)
        for view, name in enumerate(layout.store.views):
            for start in range(0, len(present), batch):
                rows = rows_present[start : start + batch]
                n = len(rows)
                if group.spec.compiled:
                    rows = torch.cat([rows, rows[-1:].expand(batch - n)])
                pixels = torch.from_numpy(images[rows.numpy()]) if isinstance(images, np.ndarray) else images[rows]
                encoded = self._encoders[path].encode(pixels.flip(WIDTH) if name == "hflip" else pixels)
                if TOKENS in encoded:
                    encoded |= twin.encode(encoded[TOKENS], rows + first_row, view)
                # Assigning would cast, float32 tokens to int8 say, without a word.
                assert dtypes == {array: values.dtype for array, values in encoded.items()}, encoded
                for array, values in encoded.items():
                    arrays[array][rows[:n], view] = values[:n]
                on_batch((view + (start + n) / len(present)) / len(layout.store.views))
        if device.type == "cuda":
            _wait_for(torch.cuda.current_stream(device))
        return arrays

    def _twin(self, group: GroupPlan) -> Twin[Any]:
        """The group's codec where images are; kept, since its tables are."""
        from storage.torch.codecs import twin_of

        path = group.layout.path
        if path not in self._twins:
            self._twins[path] = twin_of(codec_of(group.identity))
        return self._twins[path]


def _wait_for(stream: torch.cuda.Stream) -> None:
    """Asleep, where `synchronize` would keep the actor's core busy looking, which publishing needs."""
    import torch

    done = torch.cuda.Event(blocking=True)
    done.record(stream)
    done.synchronize()


def _out_of_gpu_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError)


def _release_gpu_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
