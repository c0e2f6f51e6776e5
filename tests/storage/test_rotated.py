"""Rotated codes: right on average, as near as they promise, and as `docs/store-format.md` says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.base.errors import StoreError, UserError
from storage.codecs import CODECS, codec_of
from storage.codecs.rotated import ROTATED, Rotated
from storage.codecs.rotation import MAX_ODD, Rotation, kronecker, sign_words
from storage.identity import FeaturesIdentity
from tests.examples import examples
from tests.features import DISTRIBUTIONS, cosines, outlier_channels
from tests.slow import slow_but

COSINES = {1: 0.7979, 2: 0.9394, 4: 0.9952}
WIDTHS = (8, 24, 40, 384, 768, 1024, 1152, 1280, 1536)


def of_mean_zero(token: np.ndarray) -> np.ndarray:
    """(2, D): a token and its opposite, so that the mean is zero and r the token."""
    return np.stack([token, -token]).astype(np.float32)


def decoded(codec: Rotated, tokens: np.ndarray, rows: np.ndarray, view: int = 0) -> np.ndarray:
    return codec.decode(codec.encode(tokens, rows, view), rows, view)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_transform_is_orthogonal_and_its_factors_are_a_dct_and_a_hadamard_matrix(width: int) -> None:
    outer, inner = kronecker(width)
    h = np.kron(outer, inner).astype(np.float64)
    np.testing.assert_allclose(h @ h.T, np.eye(width), atol=2e-6)
    assert set(np.unique(inner)) <= {-1, 1}
    words = sign_words(np.array([3]), 1, 5, 2 * -(-width // 64))[0]
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    z = Rotation(words, width).forward(x)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8).reshape(5, 2, -1), axis=-1, bitorder="little")
    first, second = (1 - 2 * bits[:, half, :width].astype(np.float64) for half in (0, 1))
    np.testing.assert_allclose(z, (((x * first) @ h.T) * second) @ h.T, atol=1e-5)
    np.testing.assert_allclose(Rotation(words, width).inverse(z), x, atol=1e-5)


@pytest.mark.parametrize("codec", ROTATED, ids=lambda codec: codec.spelling)
@pytest.mark.parametrize("name", slow_but(DISTRIBUTIONS, ["Gaussian", "massive activations"]))
def test_the_mean_over_keys_is_the_token(name: str, codec: Rotated) -> None:
    """To one over the root of their number; the codes of one rotation alone never come nearer (the last lines)."""
    n, width = 1024, 96
    token = DISTRIBUTIONS[name](np.random.default_rng(1), 40, width)[0]
    tokens = np.broadcast_to(of_mean_zero(token), (n, 2, width))
    found = decoded(codec, tokens, np.arange(n))[:, 0].astype(np.float64) - token
    share = np.linalg.norm(token) * np.sqrt(1 / codec.rho - 1)  # of one token's error
    assert np.sqrt((found**2).sum(1).mean()) == pytest.approx(share, rel=0.08)
    for part in (64, 256, n):
        assert np.linalg.norm(found[:part].mean(0)) < 1.6 * share / np.sqrt(part), part
    one_rotation = decoded(codec, tokens[:64], np.full(64, 7))[:, 0].astype(np.float64) - token
    assert np.linalg.norm(one_rotation.mean(0)) > 0.5 * share


def test_a_large_channel_does_not_drown_the_others_on_average() -> None:
    """At one bit; with one round of signs the rest would be a tenth too small."""
    codec, n, width = Rotated(bits=1), 6000, 64
    token = np.random.default_rng(0).standard_normal(width)
    token[5] = 0
    token *= 0.6 / np.linalg.norm(token)
    token[5] = 0.8
    found = decoded(codec, np.broadcast_to(of_mean_zero(token), (n, 2, width)), np.arange(n))[:, 0].mean(0)
    rest = np.arange(width) != 5
    assert found[rest] @ token[rest] / (token[rest] @ token[rest]) == pytest.approx(1, abs=0.05)
    assert found[5] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("codec", ROTATED, ids=lambda codec: codec.spelling)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_error_is_what_is_promised_whatever_the_distribution(name: str, codec: Rotated) -> None:
    draw = DISTRIBUTIONS[name]
    y = draw(np.random.default_rng(2), 600, 384).reshape(6, 100, 384)
    arrays = codec.encode(y, np.arange(6), 1)
    r = y - arrays["mean"].astype(np.float32)[:, None]
    r_hat = codec.decode(arrays, np.arange(6), 1) - arrays["mean"].astype(np.float32)[:, None]
    found = cosines(r, r_hat)
    assert found.mean() == pytest.approx(COSINES[codec.bits], abs=0.004)
    assert found.min() > COSINES[codec.bits] - 0.12 / codec.bits
    along = (r.astype(np.float64) * r_hat).sum(-1) / (r.astype(np.float64) ** 2).sum(-1)
    np.testing.assert_allclose(along, 1, atol=1e-3)  # float16's rounding of f
    np.testing.assert_allclose(arrays["scale"][..., 1].astype(float) * 384**0.5, np.linalg.norm(y, axis=-1), rtol=6e-4)


def test_a_mean_apart_is_worth_its_bytes() -> None:
    y = outlier_channels(8)(np.random.default_rng(0), 256, 384)[None]
    y += 2 * np.random.default_rng(1).standard_normal(384).astype(np.float32)
    assert cosines(y, decoded(Rotated(bits=1), y, np.arange(1))).mean() > 0.93


@pytest.mark.parametrize("which", ["row", "view", "token", "word"])
def test_signs_are_balanced_and_do_not_know_of_each_other(which: str) -> None:
    """2¹⁸ bits each; a correlation of six deviations would be a chance of one in 10⁹."""
    rows, n_tokens = np.arange(2**40 - 64, 2**40), 64
    words = sign_words(rows, 0, n_tokens, 2)
    other = {
        "row": lambda: sign_words(rows + 1, 0, n_tokens, 2),
        "view": lambda: sign_words(rows, 1, n_tokens, 2),
        "token": lambda: sign_words(rows, 0, n_tokens + 1, 2)[:, 1:],
        "word": lambda: words[..., ::-1],
    }[which]()
    octets = [np.ascontiguousarray(of).view(np.uint8) for of in (words, other)]
    mine, theirs = (1 - 2 * np.unpackbits(of).astype(np.int64) for of in octets)
    n = len(mine)
    assert abs(mine.sum()) < 6 * n**0.5
    by_bit = (1 - 2 * np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).astype(np.int64)).sum(0)
    assert (abs(by_bit) < 6 * (n / 64) ** 0.5).all()
    lagged = [int(mine @ np.roll(theirs, shift)) for shift in range(3)]
    assert all(abs(value) < 6 * (2 * n) ** 0.5 for value in lagged)
    assert len(np.unique(words)) == words.size


@given(st.sampled_from(ROTATED), st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=examples(40))
def test_any_shape_and_codes_lie_where_the_format_says(
    codec: Rotated, n: int, n_tokens: int, eighths: int, data: st.DataObject
) -> None:
    width = eighths * codec.per_byte
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    y = (rng.standard_normal((n, n_tokens, width)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    rows, views = rng.integers(0, 2**40, n), rng.integers(0, 2, n)
    arrays = codec.encode(y, rows, views)
    assert {name: (a.dtype.name, a.shape[1:]) for name, a in arrays.items()} == codec.arrays(n_tokens, width)
    assert codec.tokens_shape(arrays["patches"].shape[1:]) == (n_tokens, width)
    found = codec.decode(arrays, rows, views)
    for i in range(n):  # a sample is encoded alone as among others
        alone = codec.encode(y[i : i + 1], rows[i : i + 1], int(views[i]))
        assert all(np.array_equal(alone[name][0], arrays[name][i]) for name in arrays)
    bits = np.unpackbits(arrays["patches"], axis=-1, bitorder="little").reshape(n, n_tokens, width, codec.bits)
    codes = (bits * 2 ** np.arange(codec.bits)).sum(-1)
    words = sign_words(rows, views, n_tokens, 2 * -(-width // 64))
    for i in range(n):
        z = codec.levels[codes[i]] * arrays["scale"][i, :, :1].astype(np.float32)
        again = Rotation(words[i], width).inverse(z) + arrays["mean"][i].astype(np.float32)
        np.testing.assert_allclose(found[i], again, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("codec", ROTATED, ids=lambda codec: codec.spelling)
def test_images_without_contrast_tokens_of_zeros_and_extremes(codec: Rotated) -> None:
    y = np.zeros((5, 3, 64), dtype=np.float32)
    y[1] = 0.5  # constant: r is zero
    y[2, 1] = 3  # zeros beside another
    y[3] = 40000 * np.sign(np.random.default_rng(0).standard_normal((3, 64)))
    y[4] = np.random.default_rng(0).standard_normal((3, 64)) * 1e-6
    found = decoded(codec, y, np.arange(5))
    np.testing.assert_array_equal(found[:2], y[:2])
    assert np.isfinite(found).all()
    assert np.abs(found[4]).max() < 1e-5
    lengths = codec.encode(y, np.arange(5), 0)["scale"][..., 1].astype(np.float32) * 8
    np.testing.assert_allclose(lengths, np.linalg.norm(y, axis=-1), rtol=6e-4, atol=3e-7)


@pytest.mark.parametrize("codec", ROTATED, ids=lambda codec: codec.spelling)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_a_token_that_cannot_be_encoded_is_named(codec: Rotated, bad: float) -> None:
    y = np.ones((2, 5, 64), dtype=np.float32)
    y[1, 3, 63] = bad
    with pytest.raises(UserError, match=rf"token \(1, 3\) holds NaN, infinity or .* which {codec.spelling} features"):
        codec.encode(y, np.arange(2), 0)
    with pytest.raises(UserError, match="must be float32 or float16, got float64"):
        codec.encode(y.astype(np.float64), np.arange(2), 0)


def test_the_limit_is_the_bits_own_and_the_fix_is_named() -> None:
    signs = np.sign(np.random.default_rng(0).standard_normal((1, 2, 768))).astype(np.float32)
    signs[:, 1] = -signs[:, 0]
    for bits, limit, others in (
        (1, 41700, "rotated2, rotated4, int8"), (2, 57800, "rotated4, int8"), (4, 64900, "int8"),
    ):  # fmt: skip
        codec = Rotated(bits=bits)
        decoded(codec, signs * 0.97 * limit, np.arange(1))
        with pytest.raises(
            UserError, match=rf"above about {limit:,}, which {codec.spelling} .*; store {others} or float"
        ):
            codec.encode(signs * np.float32(1.04 * limit), np.arange(1), 0)


def test_widths_that_do_not_fit_are_refused_by_name() -> None:
    for spelling, width in (("rotated1", 36), ("rotated2", 30), ("rotated4", 33)):
        with pytest.raises(UserError, match=f"{spelling} packs .* do not divide {width} channels; store float16"):
            CODECS[spelling].arrays(4, width)
    with pytest.raises(UserError, match=rf"a transform of order {MAX_ODD + 2}, the largest odd one is {MAX_ODD}"):
        CODECS["rotated1"].arrays(4, 8 * (MAX_ODD + 2))
    assert decoded(Rotated(bits=4), np.ones((1, 2, 2 * 999), np.float32), np.arange(1)).shape == (1, 2, 1998)


def test_the_codec_of_an_identity() -> None:
    for codec in ROTATED:
        assert codec_of(FeaturesIdentity(codec=codec.identity)) == codec
        assert CODECS[codec.spelling] == codec
    assert ROTATED[1].identity == {"name": "rotated", "bits": 2}
    for unknown in ({"name": "rotated", "bits": 3}, {"name": "rotated"}, {**ROTATED[0].identity, "rounds": 3}):
        with pytest.raises(StoreError):
            codec_of(FeaturesIdentity(codec=unknown))
