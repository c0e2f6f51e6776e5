"""What the meter says of runs that are simulated: two encoders, so many decoders, units of given seconds."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import progress
from pipeline.cluster.resources import Node, share_out
from pipeline.progress import Display, Meter
from storage.base.console import Stop
from tests.pipeline.fakes import Pictures, plan_of
from tests.pipeline.test_what_the_user_sees import partly


def simulated(n_decoders: int, decode_s: float, encode_s: float, seconds: float = 300.0) -> Meter:
    """Two encoders that encode whatever is decoded, in steps of a tenth of a second; 10 images a unit."""
    meter = Meter(2, n_decoders)
    decoded, left_s = 0.0, [0.0, 0.0]
    for step in range(round(seconds * 10)):
        now_s = step / 10
        decoded = min(decoded + n_decoders * 0.1 / decode_s, 4)
        for i in range(2):
            if left_s[i] > 0:
                left_s[i] -= 0.1
                if left_s[i] <= 1e-9:
                    left_s[i] = 0.0
                    meter.unit_done(now_s, 10, decode_s, encode_s)
            if left_s[i] == 0 and decoded >= 1:
                decoded -= 1
                left_s[i] = encode_s
        meter.step(now_s, 2, left_s.count(0.0))
    return meter


def test_encode_bound() -> None:
    meter = simulated(n_decoders=16, decode_s=1.0, encode_s=1.0)
    assert meter.bound == "encode-bound"
    assert meter.busy > 0.9
    assert meter.images_per_s == pytest.approx(20, rel=0.05)


def test_decode_bound_names_the_decoders_that_would_do() -> None:
    meter = simulated(n_decoders=3, decode_s=4.0, encode_s=1.0)
    assert meter.bound == "decode-bound"
    assert meter.busy == pytest.approx(3 / 8, rel=0.1)
    assert meter.images_per_s == pytest.approx(7.5, rel=0.05)
    assert meter.decoders_wanted == 8
    assert simulated(n_decoders=8, decode_s=4.0, encode_s=1.0).busy > 0.85


def test_before_the_first_unit_nothing_is_claimed() -> None:
    meter = Meter(2, 4)
    meter.step(0.0, 0, 0)
    meter.step(1.0, 0, 0)
    assert (meter.busy, meter.starved, meter.images_per_s, meter.settled) == (0, 0, 0, False)
    assert meter.decoders_wanted == 4


def test_the_user_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    meter = simulated(n_decoders=3, decode_s=4.0, encode_s=1.0)
    display = Display(1_000_000, meter, decode_cpus=2, unit="GPU")
    with display.bar:
        for _ in range(3):
            display.unit_done(10, n_failed=1)
    said = capsys.readouterr().err
    assert said.count("images/s:") == 1
    assert "37 hours for the 999990 images left" in said
    assert said.count("decoding starves the encoders") == 1
    assert "16 CPUs for decoding would keep them busy, there are 6" in said
    assert "1 failed, GPU busy 3" in said


def test_short_runs_are_spared_the_advice(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(60, simulated(n_decoders=3, decode_s=4.0, encode_s=1.0), decode_cpus=1, unit="encoder")
    with display.bar:
        display.unit_done(10, n_failed=0)
    assert "starves" not in capsys.readouterr().err
    assert progress.WORTH_SAYING_S > 60 / 7.5


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 90),  # seconds since the last event
        st.integers(0, 128),  # encoders that are up
        st.integers(0, 128),  # of which idle
        st.lists(st.tuples(st.integers(1, 512), st.floats(0, 60)), max_size=3),  # units: images, seconds of encoding
    ),
    max_size=30,
)


@given(EVENTS)
def test_what_was_lately_is_the_plain_sum_over_the_window(events: list[tuple[float, int, int, list]]) -> None:
    meter, now_s = Meter(128, 4), 1e6
    steps: list[tuple[float, float, float]] = []
    encoded: list[tuple[float, int, float]] = []
    for i, (took_s, n_up, n_idle, units) in enumerate(events):
        before_s, now_s = now_s, now_s + took_s
        meter.step(now_s, n_up, min(n_up, n_idle))
        if i:
            steps.append((now_s, n_up * (now_s - before_s), min(n_up, n_idle) * (now_s - before_s)))
        for n_images, encode_s in units:
            meter.unit_done(now_s, n_images, 1.0, encode_s)
        lately = [entry for entry in steps if entry[0] >= now_s - progress.RECENT_S]
        encoded = [entry for entry in encoded if entry[0] >= now_s - progress.RECENT_S]
        encoded += [(now_s, *unit) for unit in units]
        up_s = math.fsum(up for _, up, _ in lately)
        if up_s > 1e-3 or up_s == 0:  # a whole nanosecond is nothing beside it
            busy = min(1.0, math.fsum(s for _, _, s in encoded) / up_s) if up_s else 0.0
            assert meter.busy == pytest.approx(busy, rel=1e-4, abs=1e-4)
            starved = math.fsum(idle for _, _, idle in lately) / up_s if up_s else 0.0
            assert meter.starved == pytest.approx(starved, rel=1e-4, abs=1e-4)
        span_s = encoded[-1][0] - encoded[0][0] if encoded else 0.0
        rate = sum(n for _, n, _ in encoded[1:]) / span_s if span_s else 0.0
        assert meter.images_per_s == pytest.approx(rate, rel=1e-9)


def test_an_empty_window_leaves_nothing_behind() -> None:
    meter = Meter(1, 1)
    for i in range(10_000):
        meter.step(i * 0.1, 3, 1)
        meter.unit_done(i * 0.1, 7, 0.1, 0.1)
    meter.step(1e6, 0, 0)
    assert (meter.busy, meter.starved, meter.images_per_s) == (0, 0, 0)


@given(steps=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=20))
def test_the_bar_shows_what_is_encoded_never_goes_back_and_ends_where_it_should(steps: list[tuple[int, bool]]) -> None:
    """Shares in hand come and go, with units that fail, while units of 10 images are published."""
    n_published = sum(is_done for _, is_done in steps)
    display = Display(10 * n_published + 30, Meter(1, 1), decode_cpus=1, unit="encoder")
    shown = [display.bar.n]
    done = 0
    for in_hand, is_done in steps:
        display.in_hand(in_hand)
        assert display.bar.n >= done + in_hand
        shown.append(display.bar.n)
        if is_done:
            done += 10
            display.unit_done(10, 0)
            shown.append(display.bar.n)
            assert display.bar.n >= done
    assert shown == sorted(shown)
    assert shown[-1] <= done + max([n for n, _ in steps], default=0)
    display.bar.close()


def test_a_resumed_bar_begins_where_it_was_and_its_rate_is_of_this_run(capsys: pytest.CaptureFixture[str]) -> None:
    meter = simulated(n_decoders=3, decode_s=4.0, encode_s=1.0)
    display = Display(1_000_000, meter, decode_cpus=2, unit="GPU", done=999_000)
    with display.bar as bar:
        assert (bar.n, bar.total) == (999_000, 1_000_000)
        display.in_hand(5)
        assert bar.n == 999_005
        for _ in range(3):
            display.unit_done(10, n_failed=0)
        assert bar.n == 999_030
        told = bar.format_dict
        assert (told["n"] - told["initial"], told["initial"]) == (30, 999_000)
    assert "for the 990 images left" in capsys.readouterr().err


def test_the_driver_s_bar_is_of_the_whole_store(tmp_path: Path, behind_bars: list[str]) -> None:
    from pipeline.config import PrecomputeConfig
    from pipeline.job import _Driver

    partly(tmp_path, range(3))
    source = Pictures(40, {}, "")
    plan = plan_of(str(tmp_path), source.listing().index, shard_rows=8)
    config = PrecomputeConfig(data="made-up", store=str(tmp_path))
    resources = share_out([Node(cpus=4, gpus=0)], store_bytes=2**30, unit_bytes=1, n_units=2)
    stopped = Stop(signal=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _Driver(config, plan, source, resources, None, stopped).run()  # type: ignore[arg-type]
    assert behind_bars == ["starting encoders, which load their weights", "precompute: 24/40"]


def test_encoders_are_asked_when_no_unit_came_lately() -> None:
    display = Display(100, Meter(1, 1), decode_cpus=1, unit="encoder")
    assert display.is_still(0.0), "before the first unit"
    display.unit_done(10, 0, now_s=100.0)
    assert not display.is_still(100.0 + progress.STILL_S)
    assert display.is_still(100.1 + progress.STILL_S)
    display.bar.close()
