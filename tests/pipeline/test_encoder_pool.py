"""The pool's books agree with its encoders, whatever comes back in whatever order. On a stand-in for Ray."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster.environment import prepare_ray
from pipeline.encode import CALLS_IN_HAND, Block
from storage.base.errors import UserError

ANSWERS = st.sampled_from(["fine", "fine", "fine", "raised", "CUDA error", "lost"])


@pytest.fixture(autouse=True)
def _environment_of_ray() -> None:
    """Ray reads it when it is imported, here first of all tests; those that come after start clusters."""
    prepare_ray("")


class Answers:
    """Ray, as the pool asks it; `get` answers what it is told to."""

    def __init__(self) -> None:
        self.numbers, self.answer = itertools.count(), "fine"
        self.shares: dict[int, dict[int, float]] = {}  # by ref

    def make(self) -> Any:
        def ask() -> int:
            self.shares[ref := next(self.numbers)] = dict.fromkeys(range(40), 0.5)
            return ref

        return SimpleNamespace(ready=self, encode_and_publish=self, shares=SimpleNamespace(remote=ask))

    def wait(self, refs: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return refs[: num_returns // 2 + 1], refs[num_returns // 2 + 1 :]

    def remote(self, *arguments: Any) -> int:
        return next(self.numbers)

    def get(self, ref: int) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        if self.answer == "lost":
            raise RayActorError()
        if self.answer != "fine":
            raise RayTaskError("encode", self.answer, RuntimeError(self.answer))
        return self.shares.get(ref, 1.0)

    def kill(self, actor: Any, no_restart: bool = True) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _before_ray_is_imported() -> None:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def room(pool: Any, suspect: bool) -> list[int]:
    """Calls in hand of each encoder that may be given a unit, by the rule and not by the books."""
    return [
        len(encoder.in_hand)
        for encoder in pool._encoders
        if encoder.up
        and len(encoder.in_hand) < (1 if suspect else CALLS_IN_HAND)
        and not any(other.suspect for other in encoder.in_hand.values())
    ]


@settings(deadline=None)  # the first one imports Ray
@given(n=st.integers(1, 6), data=st.data())
def test_the_books_agree_with_the_encoders(n: int, data: st.DataObject) -> None:
    from pipeline import encoder_pool
    from pipeline.encoder_pool import Decoded, EncoderPool

    with pytest.MonkeyPatch.context() as patch:
        ray = Answers()
        patch.setattr(encoder_pool, "ray", ray)
        patch.setattr(encoder_pool, "ASK_AGAIN_S", 0.0)
        pool = EncoderPool(ray.make, n, 3600.0)
        out: set[int] = set()
        for unit in range(data.draw(st.integers(0, 40))):
            match data.draw(st.sampled_from(["offer", "offer", "settle", "settle", "ask", "tick", "fit"])):
                case "offer":
                    suspect = data.draw(st.booleans())
                    may, before = room(pool, suspect), {e: len(e.in_hand) for e in pool._encoders}
                    block = Block(unit=unit, failures=(), timings_s={}, paths=())
                    assert pool.offer(Decoded(block, None, suspect)) == bool(may)
                    given_to = [before[e] for e in pool._encoders if len(e.in_hand) > before[e]]
                    assert given_to == ([min(may)] if may else [])
                    out |= {unit} if may else set()
                case "settle" if pool.refs:
                    ray.answer = data.draw(ANSWERS)
                    try:
                        settled = pool.settle(data.draw(st.sampled_from(pool.refs)))
                    except UserError:  # none is left
                        assert not pool._encoders
                        return
                    if settled is not None:
                        out.remove(settled.decoded.block.unit)
                        assert (settled.error is None) == (ray.answer == "fine")
                case "ask":
                    ray.answer = data.draw(ANSWERS)
                    shares = pool.ask_shares()
                    assert shares.keys() == out, "those in hand, of whatever was answered"
                    assert set(shares.values()) <= {0.0, 0.5}
                    asked = list(pool._asked_shares.values())
                    assert len(asked) == len({id(encoder) for encoder in asked}), "nobody is asked twice at once"
                case "tick":
                    pool.tick()
                case "fit":
                    pool.fit(data.draw(st.integers(0, 8)))
            assert pool.n_up == sum(encoder.up for encoder in pool._encoders)
            assert pool.n_idle == sum(encoder.up and not encoder.in_hand for encoder in pool._encoders)
            assert len(pool._holder) == len(out)  # every unit that was handed over comes back, once


def test_every_unit_is_driven_and_few_offers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import driver
    from pipeline import encoder_pool
    from pipeline.encoder_pool import EncoderPool

    refused = 0
    offer = EncoderPool.offer

    def counting(self: EncoderPool, decoded: Any) -> bool:
        nonlocal refused
        taken = offer(self, decoded)
        refused += not taken
        return taken

    monkeypatch.setattr(EncoderPool, "offer", counting)
    monkeypatch.setattr(encoder_pool, "ray", None)  # so that it is put back
    monkeypatch.setattr("pipeline.job.ray", None)
    assert driver.alone(2000, 16, 300, limit_s=60)[0] == 2000
    assert refused < 200
