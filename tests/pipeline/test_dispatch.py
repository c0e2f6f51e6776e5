"""The ledger: every unit ends done or given up, whatever happens to its attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.dispatch import Ledger, window


@given(n=st.integers(0, 20), max_attempts=st.integers(1, 4), data=st.data())
def test_every_unit_ends_once(n: int, max_attempts: int, data: st.DataObject) -> None:
    ledger = Ledger(range(n), max_attempts=max_attempts)
    out: list[int] = []
    attempts = dict.fromkeys(range(n), 0)
    while ledger.open:
        if (not out or data.draw(st.booleans())) and (unit := ledger.take()) is not None:
            assert unit not in out
            assert ledger.is_suspect(unit) == (attempts[unit] > 0)
            out.append(unit)
            continue
        if not out:
            continue
        unit = out.pop(data.draw(st.integers(0, len(out) - 1)))
        attempts[unit] += 1
        if data.draw(st.booleans()):
            ledger.finish(unit)
        else:
            ledger.fail(unit, f"attempt {attempts[unit]}")
        assert ledger.n_out == len(out)
    assert ledger.done | set(ledger.given_up) == set(range(n))
    assert not ledger.done & set(ledger.given_up)
    for unit, history in ledger.given_up.items():
        assert history == [f"attempt {i + 1}" for i in range(max_attempts)]
        assert attempts[unit] == max_attempts


@given(
    cpus=st.integers(0, 500),
    encoders=st.integers(1, 64),
    depth=st.integers(1, 3),
    store=st.integers(0, 2**40),
    unit=st.integers(1, 2**32),
)
def test_the_window_never_fills_more_than_half_of_the_object_store(
    cpus: int, encoders: int, depth: int, store: int, unit: int
) -> None:
    units = window(cpus, encoders, depth, store, unit)
    assert 1 <= units <= max(1, cpus + depth * encoders)
    assert units == 1 or units * unit <= store / 2
