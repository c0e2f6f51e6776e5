"""Quantising where the encoder runs: numpy's bits on every device, and what `--features-dtype int8` stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor

from pipeline.config import PrecomputeConfig
from pipeline.encoders import registry
from pipeline.plan import plan_groups
from storage import GroupLayout, StoreLayout, UserError, open_store
from storage.codecs import CODECS
from storage.codecs.int8 import INT8, LARGEST, Int8
from storage.codecs.int8 import numbers as decode
from storage.codecs.int8 import quantised as encode
from storage.torch.codecs.int8 import quantise
from storage.verify import verify
from tests.features import DISTRIBUTIONS, cosines
from tests.pipeline.encoding import encode_store, read_all

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
RESOLUTION = 128


def assert_same_bits(x: np.ndarray, codec: Int8, device: str) -> None:
    expected_q, expected_scale = encode(x, codec)
    q, scale = (t.cpu().numpy() for t in quantise(torch.from_numpy(x).to(device), codec))
    assert (q.dtype, scale.dtype) == (np.int8, np.float16)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale.view(np.int16), expected_scale.view(np.int16))


@pytest.mark.parametrize("device", DEVICES)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 3), st.integers(1, 9)), elements=st.floats(-LARGEST, LARGEST, width=32)
    ),
    st.integers(1, 5),
)
def test_torch_equals_numpy_on_any_numbers(device: str, x: np.ndarray, group_channels: int) -> None:
    assert_same_bits(x, Int8(group_channels=group_channels), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 127, 128, 200, 384, 1024])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_torch_equals_numpy_on_features(name: str, width: int, device: str) -> None:
    x = DISTRIBUTIONS[name](np.random.default_rng(width), 120, width)
    for magnitude in (2.0**-20, 0.02, 1.0, 1000.0):
        assert_same_bits(x * np.float32(magnitude), INT8, device)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_equals_numpy_beside_every_half(device: str) -> None:
    """x = (k + 1/2) · s and its float32 neighbours, where an approximate division would show."""
    half = np.arange(127, dtype=np.float32) + np.float32(0.5)
    for bits in (1, 5, 1023, 1024, 1025, 0x3C01, 0x3555, 0x7BFF):
        s = np.array(bits, dtype=np.int16).view(np.float16).astype(np.float32)
        exact = half * s
        for x in (np.nextafter(exact, np.float32(0)), exact, np.nextafter(exact, np.float32(np.inf))):
            assert_same_bits(np.append(x, 127 * s)[None], INT8, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST])
def test_the_factors_say_which_token_cannot_be_quantised(bad: float, device: str) -> None:
    x = torch.ones(2, 5, 300, device=device)
    x[1, 3, 299] = bad
    assert INT8.unencodable({"scale": quantise(x)[1].cpu().numpy()}) == (1, 3)


def config(store: Path, **changes: object) -> PrecomputeConfig:
    settings = {"latents": "none", "features": "tiny-vit", "resolution": RESOLUTION, "shard_rows": 4} | changes
    return PrecomputeConfig(data=str(store), store=str(store), **settings)  # type: ignore[arg-type]


def test_a_float16_identity_does_not_know_of_codecs(tmp_path: Path) -> None:
    layout = StoreLayout(n_rows=4, views=("original",), resolution=RESOLUTION, shard_rows=4)
    (plain,) = plan_groups(config(tmp_path), layout, "digest")
    (quantised,) = plan_groups(config(tmp_path, features_dtype="int8"), layout, "digest")
    assert "codec" not in plain.identity.plain()
    assert plain.identity.dtype == "float16"
    assert quantised.identity == replace(plain.identity, dtype="int8", codec={"name": "int8", "group_channels": 128})
    assert arrays_of(plain.layout) == {"cls": ("float16", (128,)), "patches": ("float16", (64, 128))}
    assert arrays_of(quantised.layout) == {
        "cls": ("float16", (128,)),
        "patches": ("int8", (64, 128)),
        "scale": ("float16", (64, 1)),
    }


def arrays_of(layout: GroupLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {array.name: (array.dtype, array.row_shape) for array in layout.arrays}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_dtype": "int4"}, "--features-dtype must be one of float16, int8.*, got 'int4'"),
        ({"latents": "tiny-vae", "features": "none", "features_dtype": "int8"}, "has nothing to quantise"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    layout = StoreLayout(n_rows=1, views=("original",), resolution=RESOLUTION, shard_rows=1)
    with pytest.raises(UserError, match=message):
        plan_groups(config(tmp_path, **changes), layout, "0" * 64)


def photographs(n: int) -> np.ndarray:
    """Smooth random pictures, uint8 (n, R, R, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    size = (RESOLUTION, RESOLUTION)
    return np.stack([np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in coarse])


@pytest.mark.parametrize("flip", [False, True])
def test_the_store_holds_the_encoders_float32_numbers_quantised(tmp_path: Path, flip: bool) -> None:
    images = photographs(4)
    settings = config(tmp_path, features_dtype="int8", flip=flip)
    layout = StoreLayout(n_rows=4, views=settings.views, resolution=RESOLUTION, shard_rows=4)
    (plan,) = plan_groups(settings, layout, "digest")
    encode_store(tmp_path / "store", [plan], images)
    group = open_store(tmp_path / "store").group("features/tiny-vit")
    spec = registry.resolve_features("tiny-vit")
    encoder = registry.load(spec, resolution=RESOLUTION, device=CPU)
    for view in range(len(settings.views)):
        seen = images if view == 0 else images[:, :, ::-1].copy()
        parts = [encoder.encode_tokens(torch.from_numpy(part))[0].numpy() for part in (seen[:3], seen[3:])]  # type: ignore[attr-defined]
        tokens = np.concatenate(parts)
        stored = {name: read_all(group, name, 4, view) for name in ("patches", "scale")}
        for ours, expected in zip(stored.values(), encode(tokens), strict=True):
            np.testing.assert_array_equal(ours, expected)
        assert cosines(tokens, decode(*stored.values())).min() > 0.9995
        if view == 0:
            np.testing.assert_array_equal(group.tokens(np.arange(4)), decode(*stored.values()))
    group.close()


@pytest.mark.parametrize("spelling", ["rotated1", "rotated2", "rotated4"])
def test_the_store_holds_codes_of_the_encoders_numbers_keyed_by_row_and_view(tmp_path: Path, spelling: str) -> None:
    images, codec = photographs(4), CODECS[spelling]
    settings = config(tmp_path, features_dtype=spelling, flip=True)
    layout = StoreLayout(n_rows=4, views=settings.views, resolution=RESOLUTION, shard_rows=4)
    (plan,) = plan_groups(settings, layout, "digest")
    encode_store(tmp_path / "store", [plan], images)
    group = open_store(tmp_path / "store").group("features/tiny-vit")
    encoder = registry.load(registry.resolve_features("tiny-vit"), resolution=RESOLUTION, device=CPU)
    for view in (0, 1):
        seen = images if view == 0 else images[:, :, ::-1].copy()
        tokens = np.concatenate([encoder.encode_tokens(torch.from_numpy(p))[0].numpy() for p in (seen[:3], seen[3:])])  # type: ignore[attr-defined]
        expected = codec.encode(tokens, np.arange(4), view)
        for name in codec.names:
            np.testing.assert_array_equal(read_all(group, name, 4, view), expected[name])
        apart = tokens - tokens.mean(1, keepdims=True)
        found = group.tokens(range(4), view) - tokens.mean(1, keepdims=True)
        assert cosines(apart, found).mean() == pytest.approx(codec.rho**0.5, abs=0.02)
    faults = verify(tmp_path / "store", deep=True, n_workers=1)
    assert [fault for fault in faults if "says index_digest digest" not in fault] == []
    group.close()


def test_a_token_that_cannot_be_quantised_ends_the_unit_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = StoreLayout(n_rows=3, views=("original",), resolution=RESOLUTION, shard_rows=4)
    (plan,) = plan_groups(config(tmp_path, features_dtype="int8"), layout, "digest")

    class Broken:
        def encode(self, images: Tensor) -> dict[str, Tensor]:
            tokens = torch.ones(len(images), 64, 128)
            tokens[1, 7, 3] = torch.nan
            return {"patches": tokens, "cls": torch.zeros(len(images), 128, dtype=torch.float16)}

    monkeypatch.setattr(registry, "load", lambda *_, **__: Broken())
    with pytest.raises(UserError, match=r"features/tiny-vit, row 1, view 0: token 7 holds NaN"):
        encode_store(tmp_path / "store", [plan], photographs(3))
    assert not list((tmp_path / "store").glob("receipts/*/*/0*.json"))
