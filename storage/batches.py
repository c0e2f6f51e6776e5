"""Shuffled batches for people who bring their own trainer: a plain iterator of dicts of numpy arrays.

    for batch in iterate_batches("/stores/in256", ["latents/sd-vae-ft-mse"], batch=256, seed=0, start=step):
        moments, labels = batch["latents/sd-vae-ft-mse/moments"], batch["label"]

The order is a function of the seed in constant memory (`order.py`), so the state of the iterator is the number of the
next batch, and `start` resumes anywhere; any number of ranks cut the same global batches. A thread gathers ahead, while
the disk reads the batch after (`prefetch.py`); leaving the loop, or closing the iterator, ends it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import numpy as np

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.checks import ChecksumPolicy
from storage.codecs import TOKENS, decoded
from storage.gather import gather_into
from storage.order import ValidRows
from storage.prefetch import Prefetcher
from storage.reader import GroupReader, open_store
from storage.visits import View, Views, Visits


class Gatherer:
    """Batches of some groups of a store; `valid_rows` are the rows that failed in none. Pickles."""

    def __init__(
        self,
        store: str | os.PathLike[str],
        groups: Sequence[str],
        *,
        arrays: Sequence[str] = (),
        view: View = 0,
        decode: bool = True,
        checksums: ChecksumPolicy = "first",
        n_threads: int | None = None,
    ) -> None:
        opened = open_store(store)
        if not groups:
            raise UserError(f"name the groups to read; {opened.root} has {', '.join(opened.groups())}")
        if view != "random" and view not in range(opened.n_views):
            raise UserError(f"{opened.root} has {opened.n_views} views, so view is 0 to {opened.n_views - 1} or random")
        self.view: View = view
        self._where = str(opened.root)
        self._groups: list[GroupReader] = [
            opened.group(path, checksums=checksums, n_threads=n_threads) for path in groups
        ]
        self.n_views = opened.n_views
        self._decode = decode
        available = {name for group in self._groups for name in group.arrays}
        if set(arrays) - available:
            wrong = sorted(set(arrays) - available)[0]
            raise UserError(f"{', '.join(groups)} have arrays {', '.join(sorted(available))}, not {wrong}")
        self._arrays = set(arrays) or available
        if decode and TOKENS in self._arrays:
            self._arrays |= {name for group in self._groups for name in group.codec_arrays}
        self._wanted = [(group, name) for group in self._groups for name in sorted(self._arrays & group.arrays.keys())]
        self._labels = opened.classes.labels
        self.valid_rows = ValidRows(opened.n_rows, np.concatenate([group.failed_rows for group in self._groups]))

    def __repr__(self) -> str:
        arrays = ", ".join(f"{group.path}/{name}" for group, name in self._wanted)
        return shown(f"<{type(self).__name__} of {self._where}: {len(self.valid_rows):,} samples; {arrays}>")

    @property
    def groups(self) -> dict[str, GroupReader]:
        """The groups' readers by path, with their identities and codecs."""
        return {group.path: group for group in self._groups}

    def gather(self, rows: np.ndarray, views: Views) -> dict[str, np.ndarray]:
        """{"row", "label": int64 (B,), "<group>/<array>": (B, *row_shape)} of int64 rows (B,) and views."""
        batch = {"row": rows, "label": self._labels[rows].astype(np.int64)}
        readers = [group[name] for group, name in self._wanted]
        out = [np.empty((len(rows), *reader.row_shape), reader.dtype) for reader in readers]
        gather_into(list(zip(readers, out, strict=True)), rows, views)
        for group in self._groups:
            arrays = {name: values for (of, name), values in zip(self._wanted, out, strict=True) if of is group}
            if self._decode:
                arrays = decoded(group.codec, arrays, rows, views)
            batch |= {f"{group.path}/{name}": values for name, values in arrays.items()}
        return batch

    def will_read(self, rows: np.ndarray, views: Views) -> None:
        """Say that these are gathered soon, so that the disk starts now."""
        for group, name in self._wanted:
            group[name].will_read(rows, views)

    def close(self) -> None:
        """Close every file."""
        for group in self._groups:
            group.close()


def iterate_batches(
    store: str | os.PathLike[str],
    groups: Sequence[str],
    *,
    batch: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    arrays: Sequence[str] = (),
    view: View = "random",
    decode: bool = True,
    checksums: ChecksumPolicy = "first",
    n_threads: int | None = None,
    prefetch: int = 3,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches number `start` to `stop` − 1 (None: without end) of the order that `seed` gives, epochs following on.

    `batch` is the global batch, of which this rank's equal part is given, as `Gatherer.gather` describes it. Batches
    hold memory of their own. Raises UserError at once for what does not fit, and in the loop what reading raises.

    >>> from storage import iterate_batches
    >>> for batch in iterate_batches("stores/photos", ["latents/tiny-vae"], batch=4, seed=0, start=10, stop=12):
    ...     print(sorted(batch), batch["latents/tiny-vae/moments"].shape)
    ['label', 'latents/tiny-vae/moments', 'row'] (4, 8, 16, 16)
    ['label', 'latents/tiny-vae/moments', 'row'] (4, 8, 16, 16)
    >>> of_ranks = iterate_batches(
    ...     "stores/photos", ["latents/tiny-vae"], batch=4, seed=0, start=11, rank=1, world_size=2
    ... )
    >>> bool((next(of_ranks)["row"] == batch["row"][2:]).all())  # the second rank's part of batch 11
    True
    """
    if batch < 1 or not 0 <= rank < world_size or batch % world_size:
        raise UserError(f"a global batch of {batch} is not shared out over {world_size} ranks, of which this is {rank}")
    if start < 0 or prefetch < 1:
        raise UserError(f"batches are counted from 0 and at least one is gathered ahead, got {start=} and {prefetch=}")
    gatherer = Gatherer(
        store, groups, arrays=arrays, view=view, decode=decode, checksums=checksums, n_threads=n_threads
    )
    numbers = count(start) if stop is None else range(start, stop)
    return _iterate(gatherer, batch, seed, numbers, rank, world_size, prefetch)


def _iterate(
    gatherer: Gatherer, batch: int, seed: int, numbers: Iterable[int], rank: int, world_size: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    visits = Visits(
        gatherer.valid_rows, n_views=gatherer.n_views, seed=seed, batch=batch, rank=rank, world_size=world_size,
        view=gatherer.view,
    )  # fmt: skip
    # Batches have memory of their own, so the ring only counts them: those ahead, and the one that is being made.
    ring = [None] * (prefetch + 1)
    try:
        with Prefetcher(
            map(visits.of, numbers),
            lambda visit: gatherer.will_read(visit.rows, visit.views),
            lambda visit, _: gatherer.gather(visit.rows, visit.views),
            ring=ring,
            name="batches",
        ) as ahead:
            while (item := ahead.next()) is not None:
                ahead.give_back(None)
                yield item
    finally:
        gatherer.close()
