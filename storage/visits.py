"""Which rows a rank reads for a batch, and which of the stored views of each: the same for whoever trains.

Rows follow `order.py` over the samples that did not fail. Both are functions of the batch's number, so a run resumes at
any batch; and ranks cut one global batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from storage.order import Order, ValidRows, rank_slice
from storage.philox import MASK, philox4x32, philox_key

View = int | Literal["random"]
Views = np.ndarray | int  # int64 (B,), or one for all


class Visit(NamedTuple):
    """One rank's part of a global batch."""

    number: int
    rows: np.ndarray  # int64 (B,)
    views: Views


class Visits:
    """The batches of one rank, by number."""

    def __init__(
        self,
        valid_rows: ValidRows,
        *,
        n_views: int,
        seed: int,
        batch: int,
        rank: int,
        world_size: int,
        view: View = "random",
    ) -> None:
        """`n_views` are stored; `view` is one of them, or "random" for a fresh choice at each visit."""
        self._valid_rows, self._order, self._batch = valid_rows, Order(len(valid_rows), seed), batch
        self._part, self._seed = rank_slice(batch, rank, world_size), seed
        self._n_views, self._view = n_views, 0 if n_views == 1 else view

    def of(self, number: int) -> Visit:
        """What this rank reads for batch `number`."""
        rows = self._valid_rows.rows(self._order.global_batch(number, self._batch)[self._part])
        if self._view == "random":
            return Visit(number, rows, draw_views(self._seed, number, rows, self._n_views))
        return Visit(number, rows, self._view)


def draw_views(seed: int, number: int, rows: np.ndarray, n_views: int) -> np.ndarray:
    """A view int64 (B,) in [0, n_views) of each of rows int64 (B,), keyed by (seed, batch number, row).

    As the trainer's other draws (`trainer/loop/random_keys.py`): the first word's upper 24 bits are a uniform number.
    """
    counter = (np.zeros_like(rows), rows & MASK, rows >> 32 & MASK, np.full_like(rows, number & MASK))
    return (philox4x32(counter, philox_key(seed, "view"))[0] >> 8) * n_views >> 24
