"""Gathering: any rows, in any order, from a Zarr array's shards into a caller's buffer.

Guarantees: `out[i]` is the stored sample of (rows[i], views[i]) bit for bit, or an error that names the shard and the
row; a row that was left empty is an error, never zeros. Open files are bounded, so a store of any number of shards is
read under the usual limit of 1,024. The reader may be used from several threads, survives a fork (of a directory's
reader) and pickles (a worker process opens its own files).

Costs: a row is one range of one `preadv` straight into the caller's memory, which releases the GIL (`array_read.py`).
What is kept does not grow with the epochs: nine bytes a shard, a bit a chunk that was checked, and three bounded caches
(open files, irregular shard indexes, checksums from receipts). What is checked, and when, is in `checks.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from storage.array_read import ArrayRead, Piece, Places
from storage.base.shown import shown
from storage.layout import StoreLayout, sample_in_words
from storage.opened_array import OpenArray

MIN_SHARE_BYTES = 1 << 19  # less than this is not worth waking another thread for
CALL_BYTES = 1 << 14  # what one thread copies while it calls the kernel once


def gather_into(
    targets: Sequence[tuple[ArrayReader, np.ndarray]], rows: np.ndarray | Sequence[int], views: np.ndarray | int
) -> None:
    """The same rows of several arrays at once, such as moments and patches: `ArrayReader.read_into` for each target.

    Quicker than one after the other: threads are woken once, each with its share of the whole.
    """
    if targets:
        GatherPlan([(reader.opened, out) for reader, out in targets], rows, views).run()


class GatherPlan:
    """One read of the same rows of several arrays, shared out over the threads of the first. Made for one `run`."""

    def __init__(
        self,
        targets: Sequence[tuple[OpenArray, np.ndarray]],
        rows: np.ndarray | Sequence[int],
        views: np.ndarray | int,
    ) -> None:
        """Raises as `ArrayReader.read_into`, for all but what reading the chunks raises."""
        places: dict[StoreLayout, Places] = {}
        waiting: list[list[Piece]] = []  # on a network: begun first, and none behind another
        copying: list[ArrayRead] = []
        for array, out in targets:
            store = array.layout.store
            if store not in places:
                places[store] = Places.of(rows, views, array.layout)
            read = ArrayRead(array, places[store], out)
            if array.files.by_bytes:
                copying.append(read)
            else:
                n_pieces = max(1, min(read.n_rows, array.threads.n))
                waiting += [[piece] for piece in read.pieces([i / n_pieces for i in range(n_pieces + 1)])]
        self._threads = targets[0][0].threads
        self._shares = [*waiting, *_shares(copying, self._threads.n)]

    def run(self) -> None:
        """Fill the buffers; what they hold after an error is undefined."""
        self._threads.share(_call, self._shares)


def _shares(reads: list[ArrayRead], n_threads: int) -> list[list[Piece]]:
    """Lists of pieces that cost alike, one a thread.

    All rows of the array of the shortest rows come first, then the next array's, and the whole is cut. So while one
    thread reads short rows, for which it takes Python's lock again and again, the others read long ones and seldom want
    it.
    """
    n_bytes, n_rows = sum(read.n_bytes for read in reads), sum(read.n_rows for read in reads)
    n_shares = max(1, min(n_threads, n_bytes // MIN_SHARE_BYTES, n_rows))
    shares: list[list[Piece]] = [[] for _ in range(n_shares)]
    reads = sorted(reads, key=lambda read: read.row_bytes)
    costs = [read.n_bytes + CALL_BYTES * read.n_rows for read in reads]
    total, before = sum(costs), 0
    for read, cost in zip(reads, costs, strict=True):
        cuts = [min(1.0, max(0.0, (total * i / n_shares - before) / max(1, cost))) for i in range(n_shares + 1)]
        for share, piece in zip(shares, read.pieces(cuts), strict=True):
            share.append(piece)
        before += cost
    return shares


def _call(pieces: list[Piece]) -> None:
    for piece in pieces:
        piece()


class ArrayReader:
    """One array of a group, read by rows. `shape`, `dtype` and `row_shape` describe it; made by `GroupReader`.

    >>> import numpy as np
    >>> from storage import open_store
    >>> patches = open_store("stores/photos").group("features/tiny-vit")["patches"]
    >>> patches
    <ArrayReader patches: 1,152 rows, 1 view, each 64×128 float16>
    >>> out = np.empty((3, *patches.row_shape), patches.dtype)
    >>> patches.read_into([5, 0, 5], 0, out)
    >>> bool((out[0] == out[2]).all())
    True
    """

    def __init__(self, make: Callable[[], OpenArray]) -> None:
        """`make` is called once a process, and once more after `close`; it pickles if the reader shall."""
        self._make, self._opened = make, make()
        layout = self._opened.layout
        self.shape, self.row_shape, self.dtype = layout.shape, layout.row_shape, np.dtype(layout.dtype)

    def __repr__(self) -> str:
        layout = self._opened.layout
        sample = sample_in_words(self.row_shape, self.dtype)
        return f"<{type(self).__name__} {shown(layout.name)}: {layout.store}, each {sample}>"

    @property
    def opened(self) -> OpenArray:
        """What this process holds of the array; after a fork a new one, as the parent's is not ours."""
        if self._opened.pid != os.getpid():
            self._opened = self._make()
        return self._opened

    def read_into(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int, out: np.ndarray) -> None:
        """Read sample `rows[i]`, view `views[i]` into `out[i]`.

        `rows` int64 (B,), any order, repeats allowed; `views` int64 (B,) or one int; `out` C-contiguous
        (B, *row_shape) of this array's dtype. Raises IndexError for a row or view that does not exist and StoreError,
        naming shard and row, for an empty row, a damaged shard or a wrong checksum; `out` is then undefined.
        """
        gather_into([(self, out)], rows, views)

    def will_read(self, rows: np.ndarray | Sequence[int], views: np.ndarray | int) -> None:
        """Say that these rows are read soon, so that the disk starts now. Costs system calls, returns nothing.

        A hint: the rows must exist, and nothing else is checked. Does nothing for a remote root, whose requests are
        already many at once.
        """
        array = self.opened
        units, slots, _, _ = Places.of(rows, views, array.layout)
        if len(units) and array.files.by_bytes:
            offsets = array.offsets.find(units, slots)
            present = offsets >= 0
            array.files.will_read(units[present], offsets[present], array.layout.stored_bytes)

    def close(self) -> None:
        """Close every file and stop the threads; the reader opens them again if it is used again."""
        if self._opened.pid == os.getpid():  # else locks of the parent may be held for ever
            self._opened.close()
        self._opened = self._make()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._opened = self._make()
