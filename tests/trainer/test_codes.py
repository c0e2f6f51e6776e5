"""Rotated codes where the model trains: torch's tokens are numpy's, losses take stored lengths, runs resume."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storage import open_store
from storage.base.errors import UserError
from storage.codecs import CODECS
from storage.codecs.rotated import ROTATED, Rotated
from storage.codecs.rotation import kronecker, sign_words
from storage.torch.codecs import Tokens, twin_of
from storage.torch.codecs import rotated as twins
from storage.torch.codecs.twin import LONGEST_ERROR
from tests.features import DISTRIBUTIONS
from tests.stores import FEATURES, decoded, encoded, make_store
from tests.trainer.runs import assert_same_run, micro
from trainer.alignment import ALIGNMENTS, alignment_named
from trainer.alignment.cosine import Cosine
from trainer.alignment.kind import Alignment
from trainer.data.groups import open_data
from trainer.data.loader import Loader, behind_class_token
from trainer.loop.train import train
from trainer.run.metrics import read_metrics

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
ROUNDING = 4e-6  # of a coordinate in float32, in units of its token's ‖r‖/√D
CODES = pytest.mark.parametrize("codec", ROTATED, ids=lambda codec: codec.spelling)


@pytest.mark.parametrize("device", DEVICES)
def test_signs_are_numpys_to_the_bit(device: str) -> None:
    rows, views = np.array([0, 5, 2**33, 2**40 - 1]), np.array([0, 1, 0, 1])
    on_device = [torch.from_numpy(of).to(device) for of in (rows, views, twins.word_steps(5))]
    found = twins.sign_words(*on_device[:2], 9, on_device[2])
    np.testing.assert_array_equal(found.cpu().numpy().view(np.uint64), sign_words(rows, views, 9, 5))


def unpacked(patches: np.ndarray, codec: Rotated) -> np.ndarray:
    """Codes int64 (B, T, D) of bytes."""
    shifts = codec.bits * np.arange(codec.per_byte)
    return ((patches[..., None] >> shifts) & (2**codec.bits - 1)).reshape(*patches.shape[:2], -1).astype(np.int64)


def distances(r: np.ndarray, rows: np.ndarray, views: np.ndarray, codec: Rotated) -> np.ndarray:
    """How far every coordinate of R r is from the nearest threshold, in units of ‖r‖/√D, in float64; r (B, T, D)."""
    n_tokens, width = r.shape[1:]
    h = np.kron(*kronecker(width)).astype(np.float64)
    words = sign_words(rows, views, n_tokens, 2 * -(-width // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(*words.shape[:2], 2, -1)[..., :width]
    first, second = np.moveaxis(1 - 2.0 * bits, 2, 0)
    z = (((first * r) @ h.T) * second) @ h.T
    in_units = z / np.sqrt(np.square(r).mean(-1, keepdims=True)).clip(1e-30)
    return np.abs(in_units[..., None] - codec.thresholds).min(-1)


@pytest.mark.parametrize("device", DEVICES)
@CODES
@pytest.mark.parametrize("width", [8, 24, 384, 768, 1152, 1536])
def test_torch_equals_numpy(width: int, codec: Rotated, device: str) -> None:
    rows, views = np.array([3, 2**35]), np.array([1, 0])
    twin = twin_of(codec)
    on_device = [torch.from_numpy(of).to(device) for of in (rows, views)]
    for draw in DISTRIBUTIONS.values():
        y = draw(np.random.default_rng(width), 40, width).reshape(2, 20, width)
        arrays = codec.encode(y, rows, views)
        found = {name: a.cpu().numpy() for name, a in twin.encode(torch.from_numpy(y).to(device), *on_device).items()}
        assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in arrays.items()}
        np.testing.assert_array_equal(found["mean"], arrays["mean"])
        np.testing.assert_allclose(found["scale"], arrays["scale"], rtol=2**-10)
        steps = unpacked(found["patches"], codec) - unpacked(arrays["patches"], codec)
        assert np.abs(steps).max() <= 1
        if steps.any():
            mean = arrays["mean"].astype(np.float32)[:, None]  # r is taken in float32, as the format says
            assert distances((y - mean).astype(np.float64), rows, views, codec)[steps != 0].max() < ROUNDING
        stored = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
        tokens = twin.decode(stored, *on_device)
        expected = codec.decode(arrays, rows, views)
        np.testing.assert_allclose(tokens.values.cpu().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(y).max())
        assert tokens.norms is not None
        np.testing.assert_allclose(tokens.norms.cpu().numpy(), np.linalg.norm(y, axis=-1), rtol=6e-4)


@CODES
def test_the_variance_is_that_of_the_error(codec: Rotated) -> None:
    y = torch.randn(4, 200, 384, generator=torch.Generator().manual_seed(0)) + 1
    twin, rows = twin_of(codec), torch.arange(4)
    tokens = twin.decode(twin.encode(y, rows, 0), rows, 0)
    assert tokens.variance is not None
    assert ((tokens.values - y).square().mean() / tokens.variance.mean()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@CODES
def test_compiled_in_one_piece(codec: Rotated) -> None:
    y, rows, views = torch.randn(3, 16, 384), torch.arange(3), torch.tensor([0, 1, 1])
    twin = twin_of(codec)
    arrays = twin.encode(y, rows, views)
    plain = twin.decode(arrays, rows, views)
    torch._dynamo.reset()
    tables = twin.tables(384, y.device)
    compiled = torch.compile(twins.decoded, dynamic=False, fullgraph=True)
    again = compiled(arrays["patches"], arrays["scale"], arrays["mean"], rows, views, tables, codec.rho)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@CODES
def test_batches_hold_the_decoded_rows_of_their_view(tmp_path: Path, codec: Rotated) -> None:
    arrays = make_store(tmp_path / "s", n_views=2, codec=codec)[FEATURES]
    expected = decoded(arrays, codec)
    data = open_data(micro(tmp_path / "s", tmp_path / "run"))
    seen = set()
    options: dict[str, Any] = {"seed": 3, "batch": 12, "start": 0, "stop": 5, "rank": 0, "world_size": 1, "prefetch": 2}
    with Loader(data, device=torch.device("cpu"), **options) as batches:
        for batch in batches:
            for row, found in zip(batch.rows.tolist(), batch.targets[0].values.numpy(), strict=True):
                views = [view for view in (0, 1) if np.allclose(found, expected[row, view], atol=1e-4)]
                assert len(views) == 1
                seen.update(views)
    assert seen == {0, 1}
    data.close()


def unbiased(kind: Alignment, y: Tensor, codec: Rotated, n: int) -> Tensor:
    """The mean over `n` keys of what projections are compared with."""
    twin = twin_of(codec)
    total = torch.zeros_like(y)
    for row in range(n):
        rows = torch.tensor([row])
        total += kind.prepared(twin.decode(twin.encode(y, rows, 0), rows, 0))
    return total / n


@CODES
def test_the_gradient_is_right_on_average_and_would_not_be_of_a_normalised_target(codec: Rotated) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 64, 96, generator=generator) + torch.randn(96, generator=generator)
    h = (y + torch.randn(y.shape, generator=generator)).requires_grad_()
    kind, n = Cosine(), 300

    def gradient(direction: Tensor) -> Tensor:
        return torch.autograd.grad(kind.loss(h, direction).sum(), h)[0]

    exact = gradient(kind.prepared(Tokens(y)))
    found = gradient(unbiased(kind, y, codec, n))
    share = (1 / codec.rho - 1) ** 0.5
    assert ((found - exact).norm() / exact.norm()).item() < 3 * share / n**0.5 + 5e-4
    twin, rows = twin_of(codec), torch.tensor([0])
    once = twin.decode(twin.encode(y, rows, 0), rows, 0)
    again = kind.prepared(Tokens(once.values))  # as if it were exact
    assert (again * kind.prepared(Tokens(y))).sum(-1).mean().item() < 1 - 0.3 * share**2 / 2


@CODES
def test_a_short_token_counts_as_much_as_its_error_allows(codec: Rotated) -> None:
    """Zeros and a thousandth beside tokens of usual length: no direction, and a bounded one that points its way."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 64, 96, generator=generator) + torch.randn(96, generator=generator)
    y[:, 3], y[:, 5] = 0, y[:, 5] / 1000
    kind, n = Cosine(), 400
    twin = twin_of(codec)
    rows = torch.arange(n)
    found = kind.prepared(twin.decode(twin.encode(y.expand(n, -1, -1), rows, 0), rows, 0))
    assert not found[:, 3].any()
    lengths = found[:, 5].norm(dim=-1)  # 62 to 508 were they taken over the token's own
    assert lengths.mean() < LONGEST_ERROR * 1.1
    assert lengths.max() < LONGEST_ERROR * 3
    exact = kind.prepared(Tokens(y))
    others = [token for token in range(64) if token not in (3, 5)]
    assert found[:, others].norm(dim=-1).max() < 3
    assert ((found[:, others].mean(0) - exact[0, others]).norm() / exact[0, others].norm()).item() < 0.08
    along = (found[:, 5].mean(0) * exact[0, 5]).sum()
    noise = LONGEST_ERROR / (n * 96) ** 0.5  # of a mean of n errors of that length, along one of 96 dimensions
    assert abs(along - weight_of(twin, y, 5)) < 5 * noise


def weight_of(twin: Any, y: Tensor, token: int) -> float:
    """What a direction is shortened to."""
    rows = torch.arange(1)
    tokens = twin.decode(twin.encode(y, rows, 0), rows, 0)
    error = (tokens.variance[0, token] * y.shape[-1]).sqrt()
    return min(1.0, (LONGEST_ERROR * tokens.norms[0, token] / error).item())


@CODES
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_irepa_is_right_on_average(codec: Rotated, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    deviation = torch.exp(spread * torch.randn(96, generator=generator))
    y = (torch.randn(1, 256, 96, generator=generator) + torch.randn(96, generator=generator)) * deviation
    kind, n = alignment_named("irepa"), 40
    exact = kind.prepared(Tokens(y))
    assert (unbiased(kind, y, codec, n) * exact).sum(-1).mean().item() == pytest.approx(1, abs=0.06 / codec.bits)


def test_a_class_token_stays_exact() -> None:
    twin, rows = twin_of(CODECS["rotated2"]), torch.arange(2)
    y, class_token = torch.randn(2, 9, 64), torch.randn(2, 64).half()
    tokens = behind_class_token(twin.decode(twin.encode(y, rows, 0), rows, 0), class_token)
    direction = Cosine().prepared(tokens)
    assert direction.shape == (2, 10, 64)
    torch.testing.assert_close(direction[:, 0], F.normalize(class_token.float(), dim=-1), rtol=1e-5, atol=1e-6)


def test_training_and_resuming_from_codes(tmp_path: Path) -> None:
    """At four bits the losses are nearly those of the exact tokens; a run in two parts is the run in one."""
    tokens = np.random.default_rng(0).standard_normal((40, 2, 64, 24)).astype(np.float32)
    curves = {}
    for codec in (CODECS["float16"], CODECS["rotated4"]):
        store = tmp_path / codec.spelling
        features = encoded(tokens, codec)
        make_store(store, n_views=2, codec=codec, features=features)
        train(micro(store, tmp_path / f"run-{codec.spelling}"))
        curves[codec.spelling] = [line["alignment_loss"] for line in read_metrics(tmp_path / f"run-{codec.spelling}")]
    assert curves["rotated4"] != curves["float16"]
    assert curves["rotated4"] == pytest.approx(curves["float16"], abs=0.01)
    train(micro(tmp_path / "rotated4", tmp_path / "parts", steps=3))
    train(micro(tmp_path / "rotated4", tmp_path / "parts", steps=6))
    assert_same_run(tmp_path / "parts", tmp_path / "run-rotated4")


@dataclass(frozen=True, kw_only=True)
class Crooked(Alignment):
    """Not linear, or it does not say so."""

    def loss(self, projection: Tensor, target: Tensor) -> Tensor:
        return -(F.normalize(projection.float(), dim=-1) * target).sum(-1).pow(2).mean(-1)


def test_an_alignment_that_does_not_say_that_it_is_linear_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s", codec=CODECS["rotated1"])
    monkeypatch.setitem(ALIGNMENTS, "crooked", f"{__name__}:Crooked")
    with pytest.raises(
        UserError, match=r"is in rotated1 codes, .* crooked is not linear in its target; choose another"
    ):
        train(micro(tmp_path / "s", tmp_path / "run", **{"loss.alignment": ("crooked",)}))
    group = open_store(tmp_path / "s").group(FEATURES)
    assert group.tokens([3, 1]).shape == (2, 64, 24)
    group.close()
