"""Which rows a rank reads for a batch, and which of the stored views of each: the same for whoever trains.

Rows follow `order.py` over the samples that did not fail. Both are functions of the batch's number, so a run resumes at
any batch; and ranks cut one global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from storage.order import Order, ValidRows, rank_slice

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
        seed: int,
        batch: int,
        rank: int,
        world_size: int,
        choose_views: Callable[[int, np.ndarray], Views],
    ) -> None:
        """`choose_views` says which views of rows int64 (B,) batch `number` takes."""
        self._valid_rows, self._order, self._batch = valid_rows, Order(len(valid_rows), seed), batch
        self._part, self._choose_views = rank_slice(batch, rank, world_size), choose_views

    def of(self, number: int) -> Visit:
        """What this rank reads for batch `number`."""
        rows = self._valid_rows.rows(self._order.global_batch(number, self._batch)[self._part])
        return Visit(number, rows, self._choose_views(number, rows))
