"""The int8 codec against exact rational arithmetic, its derived bounds, and the quality it promises."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.base.errors import StoreError, UserError
from storage.codecs import PLAIN, codec_of
from storage.codecs.int8 import INT8, LARGEST, Int8, cosine_bound
from storage.codecs.int8 import numbers as decode
from storage.codecs.int8 import quantised as encode
from storage.identity import FeaturesIdentity
from tests.features import DISTRIBUTIONS, WIDTHS, cosines, gaussian, outlier_channels

SMALLEST_NORMAL = Fraction(127, 2**14)  # of a group's largest magnitude, from which on its factor is normal
N_TOKENS = 2000


@st.composite
def tokens(draw: st.DrawFn) -> tuple[np.ndarray, Int8]:
    """Tokens (n, D) of every magnitude that can be quantised, subnormal numbers too, and groups of a few channels."""
    codec = Int8(group_channels=draw(st.integers(1, 5)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 11)))
    limit = draw(st.sampled_from([2.0**-130, 2.0**-20, 0.01, 1.0, 40.0, LARGEST]))
    limit = float(np.float32(limit))
    elements = st.floats(-limit, limit, width=32) | st.just(0.0)
    return draw(hnp.arrays(np.float32, shape, elements=elements)), codec


def groups(x: np.ndarray, codec: Int8) -> list[list[Fraction]]:
    """The groups of all tokens, as exact numbers."""
    step = codec.group_channels
    return [[Fraction(float(v)) for v in token[i : i + step]] for token in x for i in range(0, x.shape[1], step)]


@given(tokens())
def test_factors_and_integers_are_what_exact_arithmetic_says(drawn: tuple[np.ndarray, Int8]) -> None:
    x, codec = drawn
    q, scale = encode(x, codec)
    assert (q.dtype, q.shape) == (np.int8, x.shape)
    assert (scale.dtype, scale.shape) == (np.float16, (len(x), codec.n_groups(x.shape[1])))
    assert not np.signbit(scale).any()
    for values, integers, s in zip(groups(x, codec), groups(q, codec), scale.ravel(), strict=True):
        largest, factor = max(abs(v) for v in values), Fraction(float(s))
        assert 127 * factor >= largest
        if factor == 0:
            assert largest == 0
            assert integers == [0] * len(values)
            continue
        assert 127 * Fraction(float(np.nextafter(s, np.float16(0)))) < largest  # the smallest such
        assert integers == [round(v / factor) for v in values]  # Python rounds a Fraction exactly, halves to even
        assert max(abs(i) for i in integers) <= 127


@given(st.integers(0, 126), st.integers(1, 0x7BFF), st.integers(-2, 2))
def test_quotients_beside_a_half_are_rounded_to_their_own_side(k: int, bits: int, ulps: int) -> None:
    """The float32 neighbours of (k + 1/2) · s are where a second rounding could go wrong."""
    s = np.array(bits, dtype=np.int16).view(np.float16)
    half = (np.float32(k) + np.float32(0.5)) * s.astype(np.float32)
    x = np.array([half, 127 * s.astype(np.float32)], dtype=np.float32)
    x.view(np.int32)[0] += ulps
    q, scale = encode(x)
    assert scale[0] == s
    assert int(q[0]) == round(Fraction(float(x[0])) / Fraction(float(s)))


@given(tokens())
def test_decoding_is_exact_and_the_derived_bounds_hold(drawn: tuple[np.ndarray, Int8]) -> None:
    x, codec = drawn
    q, scale = encode(x, codec)
    y = decode(q, scale, codec)
    assert y.dtype == np.float32
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(decode(q, scale, codec, dtype=np.float16), y.astype(np.float16))
    step = codec.group_channels
    for token in range(len(x)):
        of_token = slice(token, token + 1)
        originals, decoded = groups(x[of_token], codec), groups(y[of_token], codec)
        error2 = allowed2 = Fraction(0)
        for g, (values, results) in enumerate(zip(originals, decoded, strict=True)):
            s, largest = Fraction(float(scale[token, g])), max(abs(v) for v in values)
            integers = q[token, g * step : (g + 1) * step].tolist()
            assert results == [i * s for i in integers]
            assert all(abs(result - v) <= s / 2 for v, result in zip(values, results, strict=True))
            if largest >= SMALLEST_NORMAL:
                assert s < largest / 127 * (1 + Fraction(1, 2**10))
            else:
                assert s < largest / 127 + Fraction(1, 2**24)
            error2 += sum((result - v) ** 2 for v, result in zip(values, results, strict=True))
            allowed2 += len(values) * s**2 / 4
        assert error2 <= allowed2
        check_cosine(originals, decoded, allowed2, float(cosine_bound(q[token], scale[token], codec)))


def check_cosine(
    originals: list[list[Fraction]], decoded: list[list[Fraction]], allowed2: Fraction, bound: float
) -> None:
    """Both of the docstring's inequalities, squared so that they stay exact; a bound of 0 says nothing."""
    x, y = ([v for values in parts for v in values] for parts in (originals, decoded))
    dot, x2, y2 = (sum((a * b for a, b in zip(u, v, strict=True)), Fraction(0)) for u, v in ((x, y), (x, x), (y, y)))
    if x2 == 0:
        assert (y2, bound) == (0, 1)
        return
    for norm2 in (x2, y2):
        if allowed2 < norm2:
            assert dot > 0
            assert dot**2 >= (1 - allowed2 / norm2) * x2 * y2
    assert bound == pytest.approx(float(max(Fraction(0), 1 - allowed2 / y2)) ** 0.5 if y2 else 0, abs=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quality_and_size_are_as_promised(name: str, width: int) -> None:
    x = DISTRIBUTIONS[name](np.random.default_rng(width), N_TOKENS, width)
    q, scale = encode(x)
    found = cosines(x, decode(q, scale))
    assert found.mean() >= 0.9999
    assert found.min() >= 0.9995
    assert (found >= cosine_bound(q, scale) - 1e-12).all()
    assert q.nbytes + scale.nbytes <= 0.51 * x.astype(np.float16).nbytes


@pytest.mark.parametrize("width", WIDTHS)
def test_outliers_in_every_group_cost_a_tenth_of_a_thousandth_more(width: int) -> None:
    """One channel in a hundred 15 times the others reaches each group: below the mean promised, above the worst."""
    x = outlier_channels(15, one_in=100)(np.random.default_rng(width), N_TOKENS, width)
    found = cosines(x, decode(*encode(x)))
    assert 0.9998 <= found.mean() < 0.9999
    assert found.min() >= 0.9995


def test_one_channel_alone_is_the_worst_that_normal_factors_allow() -> None:
    """κ² = n: all but one channel far below it, at half a step, where every one of them is lost."""
    x = np.full((1, 768), 0.49 / 127, dtype=np.float32)
    x[:, ::128] = 1
    q, scale = encode(x)
    cosine = cosines(x, decode(q, scale))
    assert np.count_nonzero(q) == 6
    assert 0.9990 < cosine_bound(q, scale)[0] <= cosine[0] < 0.9992


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 768])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3)])
def test_any_width_and_any_leading_axes(shape: tuple[int, ...], width: int) -> None:
    x = gaussian(np.random.default_rng(0), 6, width)[: int(np.prod(shape, dtype=int))].reshape(*shape, width)
    q, scale = encode(x)
    assert scale.shape == (*shape, -(-width // 128))
    assert (np.abs(decode(q, scale) - x) <= np.repeat(scale.astype(np.float32), 128, axis=-1)[..., :width] / 2).all()
    assert cosine_bound(q, scale).shape == shape


def test_float16_is_taken_as_it_is_and_other_dtypes_are_refused() -> None:
    x = gaussian(np.random.default_rng(0), 4, 256).astype(np.float16)
    for ours, same in zip(encode(x), encode(x.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(ours, same)
    with pytest.raises(UserError, match="must be float32 or float16, got float64"):
        encode(x.astype(np.float64))


@pytest.mark.parametrize(
    "bad", [np.nan, -np.nan, np.inf, -np.inf, np.nextafter(np.float32(LARGEST), np.float32(np.inf))]
)
def test_a_token_that_cannot_be_quantised_is_named(bad: float) -> None:
    x = np.ones((2, 5, 300), dtype=np.float32)
    x[1, 3, 299] = bad
    with pytest.raises(UserError, match=r"token \(1, 3\) holds NaN, infinity or a magnitude above 8319008"):
        encode(x)


def test_the_largest_magnitude_is_kept() -> None:
    x = np.array([LARGEST, -LARGEST, 1.0], dtype=np.float32)
    q, scale = encode(x)
    assert INT8.unencodable({"scale": scale}) is None
    np.testing.assert_array_equal(decode(q, scale), [LARGEST, -LARGEST, 0])


def test_the_codec_of_an_identity() -> None:
    assert codec_of(FeaturesIdentity(dtype="float16")) == PLAIN
    of_64 = FeaturesIdentity(dtype="int8", codec={"name": "int8", "group_channels": 64})
    assert codec_of(of_64) == Int8(group_channels=64)
    assert codec_of(FeaturesIdentity(codec=INT8.identity)) == INT8
    for unknown in ({"name": "fp8", "group_channels": 128}, {"name": "int8"}, {**INT8.identity, "offset": True}):
        with pytest.raises(StoreError, match="codec that this code does not know"):
            codec_of(FeaturesIdentity(codec=unknown))
    with pytest.raises(UserError, match="at least 1, got 0"):
        Int8(group_channels=0)
