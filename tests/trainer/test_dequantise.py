"""Features from int8 on the training device: the numpy codec's bits, in the loader and in a training run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.base.errors import StoreError
from storage.codecs.int8 import INT8, Int8
from storage.codecs.int8 import numbers as decode
from storage.codecs.int8 import quantised as encode
from storage.torch.codecs.int8 import dequantise
from tests.features import gaussian
from tests.stores import FEATURES, make_store
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.groups import open_data
from trainer.data.loader import Loader
from trainer.loop.train import train

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 24, 127, 128, 200, 768, 1536])
def test_torch_equals_numpy(width: int, device: str) -> None:
    for magnitude in (2.0**-20, 0.02, 1.0, 1000.0):
        x = gaussian(np.random.default_rng(width), 60, width).reshape(3, 20, width) * np.float32(magnitude)
        x[0, 0] = 0
        q, scale = encode(x)
        found = dequantise(torch.from_numpy(q).to(device), torch.from_numpy(scale).to(device))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.cpu().numpy(), decode(q, scale))


@pytest.mark.parametrize("device", DEVICES)
def test_every_factor_times_every_integer_is_exact(device: str) -> None:
    """All there is: 255 integers and the 31,744 finite float16 that are not negative."""
    q = torch.arange(-127, 128, dtype=torch.int8).expand(0x7C00, 255)
    scale = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)[:, None]
    found = dequantise(q.to(device), scale.to(device), Int8(group_channels=255))
    assert torch.equal(found.double().cpu(), q.double() * scale.double())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("width", [24, 256, 300])
def test_compiled_equals_numpy(width: int) -> None:
    q, scale = encode(gaussian(np.random.default_rng(0), 15, width))
    torch._dynamo.reset()
    found = torch.compile(dequantise, dynamic=False)(torch.from_numpy(q), torch.from_numpy(scale))
    np.testing.assert_array_equal(found.numpy(), decode(q, scale))


def config(store: Path, **changes: object) -> TrainConfig:
    return override(preset("sit-tiny-2"), {"store": store, "device": "cpu", **changes})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "codec"), [(128, INT8), (24, INT8), (40, Int8(group_channels=16))])
def test_batches_hold_the_dequantised_rows(tmp_path: Path, width: int, codec: Int8, device: str) -> None:
    arrays = make_store(tmp_path / "s", n_views=2, width=width, codec=codec)[FEATURES]
    expected = decode(arrays["patches"], arrays["scale"], codec)
    data = open_data(config(tmp_path / "s"))
    assert [group.codec for group in data.features] == [codec]
    options = {"seed": 3, "batch": 12, "start": 0, "stop": 5, "rank": 0, "world_size": 1, "prefetch": 2}
    seen_views = set()
    with Loader(data, device=torch.device(device), **options) as batches:  # type: ignore[arg-type]
        for batch in batches:
            (patches,) = batch.targets
            assert patches.values.dtype == torch.float32
            for row, found in zip(batch.rows.tolist(), patches.values.cpu().numpy(), strict=True):
                views = [view for view in (0, 1) if np.array_equal(found, expected[row, view])]
                assert len(views) == 1
                seen_views.update(views)
    assert seen_views == {0, 1}
    data.close()


def test_training_from_int8_is_training_from_the_numbers_it_stands_for(tmp_path: Path) -> None:
    """A float16 store whose features are exactly representable as int8 gives the same losses to the last bit."""
    q = np.random.default_rng(0).integers(-127, 128, (40, 1, 64, 24)).astype(np.int8)
    q[..., 0] = 127  # so that the factor is 2⁻⁴ again
    exact = {False: {"patches": (q * 2.0**-4).astype(np.float16)}}
    exact[True] = dict(zip(("patches", "scale"), encode(exact[False]["patches"]), strict=True))
    losses = {}
    for quantised, arrays in exact.items():
        root = tmp_path / f"{quantised}"
        make_store(root, codec=INT8 if quantised else None, features=arrays)
        settings = {"run": tmp_path / f"run-{quantised}", "steps": 3, "batch": 8, "log.every": 1}
        summary = train(config(root, **settings, **{"log.tensorboard": False}))
        losses[quantised] = [summary[which][key] for which in ("first", "last") for key in ("loss", "alignment_loss")]
    assert losses[True] == losses[False]


def test_a_codec_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s", codec=Int8(name="int4"))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=rf"features of {tmp_path}/s/{FEATURES} are in a codec that this"):
        open_data(config(tmp_path / "s"))
