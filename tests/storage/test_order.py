"""The order of training is a permutation of each epoch, and looks like a random one."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.order import Order, ValidRows, rank_slice
from tests.examples import examples
from tests.slow import slow_but

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)
PINNED = [506, 662, 953, 907, 723, 672, 863, 482]  # the first rows of epoch 0 of 1000 rows under seed 0


def epoch_rows(n: int, seed: int, epoch: int) -> np.ndarray:
    return Order(n, seed).rows(epoch, np.arange(n))


def plain_row(n: int, seed: int, epoch: int, position: int) -> int:
    """The same network on Python's integers, which do not overflow."""
    words = b"".join(hashlib.sha512(f"order {seed} {epoch} {i}".encode()).digest() for i in range(2))
    keys = [int.from_bytes(words[8 * i : 8 * i + 8], "little") for i in range(12)]
    bits = 1
    while 4**bits < n:
        bits += 1
    value = position
    while True:
        left, right = value >> bits, value % 2**bits
        for key in keys:
            mixed = right ^ key
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 31) % 2**bits
        value = left << bits | right
        if value < n:
            return value


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=SEEDS, epoch=EPOCHS)
def test_every_epoch_visits_every_row_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_rows(n, seed, epoch)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 65_537])
def test_a_bijection_around_powers_of_the_domain(n: int) -> None:
    assert np.array_equal(np.sort(epoch_rows(n, 0, 0)), np.arange(n))


@settings(max_examples=examples(50), deadline=None)
@given(n=st.integers(1, 2**62), seed=SEEDS, epoch=EPOCHS, data=st.data())
def test_agrees_with_arithmetic_that_cannot_overflow(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    rows = Order(n, seed).rows(epoch, np.array(positions, dtype=np.int64))
    assert rows.tolist() == [plain_row(n, seed, epoch, position) for position in positions]


def test_the_order_is_pinned() -> None:
    # A checkpoint resumes into this order: to change it is to break every run under way.
    assert [plain_row(1000, 0, 0, p) for p in range(8)] == epoch_rows(1000, 0, 0)[:8].tolist()
    assert epoch_rows(1000, 0, 0)[:8].tolist() == PINNED


def test_rows_keep_the_shape_of_positions() -> None:
    positions = np.arange(12).reshape(3, 4)
    assert np.array_equal(Order(12, 5).rows(2, positions), epoch_rows(12, 5, 2).reshape(3, 4))
    assert Order(12, 5).rows(2, np.empty(0, dtype=np.int64)).shape == (0,)


def test_epochs_and_seeds_share_nothing() -> None:
    n = 10_007
    orders = {(seed, epoch): epoch_rows(n, seed, epoch) for seed in range(3) for epoch in range(3)}
    for a in orders:
        for b in orders:
            if a < b:
                # Two independent permutations agree at one position on average.
                assert int((orders[a] == orders[b]).sum()) < 10, (a, b)
                assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 5 / np.sqrt(n), (a, b)


@pytest.mark.parametrize("n", slow_but([11, 16], [11]))
def test_rows_are_uniform_at_every_position(n: int) -> None:
    epochs = 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), epoch_rows(n, 1, epoch)] += 1
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [3, 4])
def test_every_permutation_of_a_few_rows_occurs(n: int) -> None:
    seen = {tuple(epoch_rows(n, 2, epoch).tolist()) for epoch in range(1000)}
    assert len(seen) == {3: 6, 4: 24}[n]


@pytest.mark.parametrize("n", [16_384, 16_385, 50_000])
def test_an_epoch_looks_shuffled(n: int) -> None:
    rows, positions = epoch_rows(n, 3, 7), np.arange(n)
    assert np.abs(rows - positions).mean() == pytest.approx(n / 3, rel=0.03)
    bound = 5 / np.sqrt(n)
    assert abs(np.corrcoef(rows, positions)[0, 1]) < bound
    for lag in (1, 2, 128):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < bound, lag
    parity = (rows % 2).astype(float)
    assert abs(np.corrcoef(parity[:-1], parity[1:])[0, 1]) < bound
    quarters = np.bincount(rows[: n // 4] * 16 // n, minlength=16)
    expected = n / 64
    assert ((quarters - expected) ** 2 / expected).sum() < 15 + 5 * np.sqrt(30)


@settings(max_examples=examples(40), deadline=None)
@given(n=st.integers(1, 60), seed=SEEDS, batch=st.integers(1, 100), steps=st.integers(1, 6))
def test_batches_run_on_through_the_epochs(n: int, seed: int, batch: int, steps: int) -> None:
    rows = np.concatenate([Order(n, seed).global_batch(step, batch) for step in range(steps)])
    epochs = -(-len(rows) // n)
    assert np.array_equal(rows, np.concatenate([epoch_rows(n, seed, epoch) for epoch in range(epochs)])[: len(rows)])


@settings(deadline=None)
@given(share=st.integers(1, 9), world=st.integers(1, 12), step=st.integers(0, 1000))
def test_any_number_of_ranks_cuts_the_same_batch(share: int, world: int, step: int) -> None:
    batch = share * world
    rows = Order(100, 4).global_batch(step, batch)
    parts = [rows[rank_slice(batch, rank, world)] for rank in range(world)]
    assert {len(part) for part in parts} == {share}
    assert np.array_equal(np.concatenate(parts), rows)


def test_a_billion_rows_need_the_memory_of_a_batch() -> None:
    order = Order(10**9, 0)
    order.global_batch(0, 256)
    tracemalloc.start()
    rows = order.global_batch(3_906_249, 512)  # crosses into a later epoch
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200_000
    assert rows.dtype == np.int64
    assert rows.min() >= 0
    assert rows.max() < 10**9
    assert len(np.unique(order.global_batch(1, 4096))) == 4096


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_an_order_of_no_rows_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        Order(n, 0)


@settings(deadline=None)
@given(n=st.integers(1, 60), data=st.data())
def test_valid_rows_are_those_that_did_not_fail_in_their_order(n: int, data: st.DataObject) -> None:
    failed = data.draw(st.lists(st.integers(0, n - 1)))
    valid = ValidRows(n, np.array(failed, dtype=np.int64))
    expected = [row for row in range(n) if row not in failed]
    assert len(valid) == len(expected)
    assert valid.rows(np.arange(len(expected))).tolist() == expected
    assert valid.positions(np.array(expected, dtype=np.int64)).tolist() == list(range(len(expected)))


def test_valid_rows_of_a_billion_need_the_memory_of_the_failed_ones() -> None:
    tracemalloc.start()
    valid = ValidRows(10**9, np.array([7, 10**9 - 2]))
    rows = valid.rows(np.array([6, 7, len(valid) - 1]))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.tolist() == [6, 8, 10**9 - 1]
    assert peak_bytes < 100_000


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(AssertionError):
        rank_slice(10, 0, 4)
