"""The order of training is a function, not a list.

Position p of epoch e is row π_{seed,e}(p), with π a keyed permutation of [0, n) in constant memory. Positions run on
through the epochs: global batch b of B samples is positions [b·B, (b+1)·B) of the endless sequence, so no sample is
dropped at an epoch's end, a run resumes at any step, and any number of ranks cuts the same batches.

π is a Feistel network over the smallest 2^(2k) ≥ n with cycle walking (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002): an image outside [0, n) is permuted again until it falls inside, fewer than 4 times on
average. The round function is the finaliser of SplitMix64 over half and round key. Memory is that of the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

ROUNDS = 12


@dataclass(frozen=True)
class Order:
    """The order of `n` rows under `seed`."""

    n: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 2**62:
            raise ValueError(f"an order needs 1 to 2^62 rows, got {self.n}")

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Rows int64 at positions int64 (any shape) in [0, n) of one epoch."""
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.n)
        half_bits = max(1, ((self.n - 1).bit_length() + 1) // 2)
        keys = _round_keys(self.seed, epoch)
        values = positions.astype(np.uint64).ravel()
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            values[outside] = _feistel(values[outside], keys, half_bits)
            outside = values >= np.uint64(self.n)
        return values.astype(np.int64).reshape(positions.shape)

    def global_batch(self, step: int, batch: int) -> np.ndarray:
        """Rows int64 (batch,) of global batch number `step`, counted from 0."""
        epochs, positions = np.divmod(np.arange(step * batch, (step + 1) * batch, dtype=np.int64), self.n)
        rows = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            rows[of_epoch] = self.rows(int(epoch), positions[of_epoch])
        return rows


class ValidRows:
    """The rows of [0, n) that did not fail, by position, in memory that grows with those that did."""

    def __init__(self, n: int, failed: np.ndarray) -> None:
        """`failed` int64 (F,) in [0, n), in any order, repeats allowed."""
        failed = np.unique(failed)
        assert len(failed) == 0 or (failed[0] >= 0 and failed[-1] < n), (n, failed)
        self._n = n - len(failed)
        self._failed = failed
        self._skips = failed - np.arange(len(failed))  # the positions from which one more row is skipped

    def __len__(self) -> int:
        return self._n

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows int64 at positions int64 in [0, len(self))."""
        return positions + np.searchsorted(self._skips, positions, side="right")

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The other way round: positions int64 of rows int64 that did not fail."""
        return rows - np.searchsorted(self._failed, rows)


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """The part of a global batch that a rank trains on: equal consecutive parts."""
    assert batch % world == 0, (batch, world)
    share = batch // world
    return slice(rank * share, (rank + 1) * share)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 (ROUNDS,) from SHA-512 of seed and epoch: neighbouring seeds and epochs share nothing."""
    digests = (hashlib.sha512(f"order {seed} {epoch} {i}".encode()).digest() for i in range(2))
    return np.frombuffer(b"".join(digests), dtype="<u8")[:ROUNDS]


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A permutation of [0, 2^(2·half_bits)) on uint64 values."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) on uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
