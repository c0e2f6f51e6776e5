"""Keyed random numbers: Philox itself, what a draw depends on, and that draws are distributed as they should be."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.philox import philox4x32
from trainer.loop.random_keys import normal, uniform

WORD = st.integers(0, 2**32 - 1)
WORDS = st.tuples(WORD, WORD, WORD, WORD)
ROWS = st.integers(0, 2**62)

# Philox4x32-10 known answers, published with Salmon et al. (SC 2011): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def run_philox(counter: tuple[int, ...], key: tuple[int, int], device: str = "cpu") -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word], dtype=torch.int64, device=device) for word in counter)
    return tuple(int(word.item()) for word in philox4x32((c0, c1, c2, c3), key))


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The generator on Python's integers, which do not wrap."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plain_words(seed: int, purpose: str, step: int, row: int, block: int) -> tuple[int, ...]:
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    return plain_philox((block, row % 2**32, row >> 32, step), key)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert run_philox(counter, key) == answer


@settings(deadline=None)
@given(counter=WORDS, key=st.tuples(WORD, WORD))
def test_agrees_with_arithmetic_that_cannot_wrap(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert run_philox(counter, key) == plain_philox(counter, key)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=WORD, row=ROWS)
def test_a_draw_is_a_function_of_seed_purpose_step_and_row(seed: int, step: int, row: int) -> None:
    rows = torch.tensor([row])
    assert uniform(seed, "time", step, rows).item() == (plain_words(seed, "time", step, row, 0)[0] >> 8) / 2**24
    drawn = normal(seed, "noise", step, rows, (6,))[0]
    for block in range(2):
        w0, w1, w2, w3 = plain_words(seed, "noise", step, row, block)
        expected = []
        for word, angle in ((w0, w2), (w1, w3)):
            radius = math.sqrt(-2 * math.log(((word >> 8) + 1) / 2**24))
            turn = 2 * math.pi * (angle >> 8) / 2**24
            expected += [radius * math.cos(turn), radius * math.sin(turn)]
        part = drawn[4 * block : 4 * block + 4]
        torch.testing.assert_close(part, torch.tensor(expected)[: len(part)], atol=5e-6, rtol=1e-5)


@settings(deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=8), data=st.data())
def test_a_row_s_draws_do_not_depend_on_its_batch(rows: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    together = dict(zip(rows, normal(0, "noise", 7, torch.tensor(rows), (3, 5)), strict=True))
    times = dict(zip(rows, uniform(0, "time", 7, torch.tensor(rows)), strict=True))
    for row, drawn in zip(shuffled, normal(0, "noise", 7, torch.tensor(shuffled), (3, 5)), strict=True):
        # Vectorised log, sin and cos may round an element otherwise at another place in the tensor.
        torch.testing.assert_close(drawn, together[row], atol=1e-6, rtol=1e-6)
        assert torch.equal(uniform(0, "time", 7, torch.tensor([row]))[0], times[row])


def test_a_longer_shape_begins_with_the_shorter() -> None:
    rows = torch.arange(5)
    longer = normal(0, "noise", 1, rows, (11,))
    for n in range(1, 11):
        torch.testing.assert_close(normal(0, "noise", 1, rows, (n,)), longer[:, :n], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(normal(0, "noise", 1, rows, (2, 2, 2)).flatten(1), longer[:, :8], atol=1e-6, rtol=1e-6)


def test_every_part_of_the_key_counts() -> None:
    first = (0, "noise", 3, 5)
    others = [(1, "noise", 3, 5), (0, "posterior", 3, 5), (0, "noise", 4, 5), (0, "noise", 3, 6)]
    others += [(0, "noise", 3, 5 + 2**32), (0, "noise", 5, 3), (3, "noise", 0, 5)]
    # Adding seeds would make these equal to the first.
    others += [(1, "noise", 2, 5), (-1, "noise", 4, 5)]

    def draws(key: tuple[int, str, int, int]) -> torch.Tensor:
        seed, purpose, step, row = key
        return normal(seed, purpose, step, torch.tensor([row]), (1024,))[0]  # type: ignore[arg-type]

    reference = draws(first)
    for key in others:
        assert abs(torch.corrcoef(torch.stack([reference, draws(key)]))[0, 1].item()) < 5 / math.sqrt(1024), key


def test_dtypes_and_shapes() -> None:
    rows = torch.arange(3)
    assert uniform(0, "time", 0, rows).dtype == torch.float32
    drawn = normal(0, "noise", 0, rows, (4, 3, 3))
    assert drawn.dtype == torch.float32
    assert drawn.shape == (3, 4, 3, 3)


def test_a_step_that_does_not_fit_the_counter_is_refused() -> None:
    for step in (-1, 2**32):
        with pytest.raises(AssertionError):
            uniform(0, "time", step, torch.arange(2))


@pytest.mark.parametrize("by_step", [False, True])
def test_uniform_draws_are_uniform(by_step: bool) -> None:
    if by_step:
        drawn = torch.cat([uniform(0, "time", step, torch.arange(64)) for step in range(1000)])
    else:
        drawn = uniform(0, "time", 0, torch.arange(64_000))
    count = len(drawn)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    empirical = torch.arange(1, count + 1).double() / count
    distance = (drawn.double().sort().values - empirical).abs().max().item()
    assert distance < 2.2 / math.sqrt(count)  # Kolmogorov–Smirnov: exceeded with probability 1e-4
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].item()) < 5 / math.sqrt(count)


def test_normal_draws_are_normal() -> None:
    drawn = normal(0, "noise", 0, torch.arange(64), (4, 32, 32)).double()
    flat, count = drawn.flatten(), drawn.numel()
    assert abs(flat.mean().item()) < 5 / math.sqrt(count)
    assert flat.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    assert (flat**3).mean().item() == pytest.approx(0, abs=5 * math.sqrt(15 / count))
    assert (flat**4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / count))
    exact = torch.special.ndtr(flat.sort().values)
    empirical = torch.arange(1, count + 1).double() / count
    assert (exact - empirical).abs().max().item() < 2.2 / math.sqrt(count)
    assert flat.abs().max().item() <= 5.7681


def test_normal_draws_are_independent() -> None:
    drawn = normal(0, "noise", 0, torch.arange(500), (64,)).double()
    for values in (drawn, drawn.square()):  # squares too: a cosine and a sine share one radius
        correlation = torch.corrcoef(values.T) - torch.eye(64)
        assert correlation.abs().max().item() < 5.5 / math.sqrt(500)
        across = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
        assert abs(across.item()) < 5 / math.sqrt(499 * 64)


def test_philox_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(philox4x32, fullgraph=True, backend="eager")
    counter = (torch.arange(9), torch.arange(9) + 2**31, torch.zeros(9, dtype=torch.int64), torch.arange(9))
    for mine, expected in zip(compiled(counter, (1, 2)), philox4x32(counter, (1, 2)), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_draws_the_same_numbers() -> None:
    for counter, key, answer in KNOWN_ANSWERS:
        assert run_philox(counter, key, "cuda") == answer
    rows = torch.arange(100) * 2**33 + 7
    assert torch.equal(uniform(0, "time", 5, rows.cuda()).cpu(), uniform(0, "time", 5, rows))
    torch.testing.assert_close(
        normal(0, "noise", 5, rows.cuda(), (4, 8, 8)).cpu(),
        normal(0, "noise", 5, rows, (4, 8, 8)),
        atol=5e-6,
        rtol=1e-5,
    )
