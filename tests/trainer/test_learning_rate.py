"""The learning rate: what its parts promise, and that a step is taken with it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.base.errors import UserError
from tests.trainer.runs import curve, micro, weights
from trainer.config.optim import OptimConfig
from trainer.loop.optimiser import learning_rate
from trainer.loop.train import train
from trainer.run.metrics import read_metrics


def test_constant_unless_asked() -> None:
    assert {learning_rate(OptimConfig(), step) for step in range(0, 10**6, 997)} == {1e-4}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@given(warmup=st.integers(0, 50), start=st.integers(0, 200), length=st.integers(1, 300), final=st.floats(0, 1e-4))
def test_rises_stays_falls_and_stays(decay: Any, warmup: int, start: int, length: int, final: float) -> None:
    start = max(start, warmup)
    config = OptimConfig(warmup=warmup, decay=decay, decay_from=start, decay_until=start + length, final_lr=final)
    rates = [learning_rate(config, step) for step in range(start + length + 20)]
    assert all(a <= b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(rate == pytest.approx(config.lr) for rate in rates[max(0, warmup - 1) : start + 1])
    assert all(a >= b for a, b in itertools.pairwise(rates[start:]))
    assert all(rate == pytest.approx(final, abs=1e-12) for rate in rates[start + length :])
    if warmup:
        assert rates[0] == pytest.approx(config.lr / warmup)


def test_half_way() -> None:
    for decay, left in (("linear", 0.75), ("cosine", (1 + math.cos(math.pi / 4)) / 2)):
        config = OptimConfig(lr=2e-4, decay=decay, decay_from=100, decay_until=500, final_lr=2e-5)  # type: ignore[arg-type]
        assert learning_rate(config, 200) == pytest.approx(2e-5 + 1.8e-4 * left)


def test_a_run_is_trained_with_it_and_resumes_bit_for_bit(shared_tiny_store: Path, tmp_path: Path) -> None:
    schedule = {"optim.warmup": 3, "optim.decay": "linear", "optim.decay_from": 4, "optim.decay_until": 8}
    whole = micro(shared_tiny_store, tmp_path / "whole", **schedule, steps=8)
    train(whole)
    assert [line["learning_rate"] / 2e-3 for line in read_metrics(tmp_path / "whole")] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    for steps in (3, 6, 8):
        train(micro(shared_tiny_store, tmp_path / "parts", **schedule, steps=steps))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    train(micro(shared_tiny_store, tmp_path / "constant", steps=8))
    assert curve(tmp_path / "constant") != curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "linear"}, "--optim.decay linear needs --optim.decay-until"),
        ({"decay": "cosine", "decay_from": 10, "decay_until": 10}, "a step after --optim.decay-from .10."),
        ({"warmup": 20, "decay": "cosine", "decay_until": 10}, "and --optim.warmup .20., got 10"),
        ({"final_lr": 1e-5}, "are of a decay"),
        ({"decay": "linear", "decay_until": 9, "final_lr": 1.0}, "--optim.final-lr 1.0 is above --optim.lr 0.0001"),
        ({"warmup": -1}, "--optim.warmup must be at least 0"),
    ],
)
def test_what_makes_no_schedule_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**settings)
