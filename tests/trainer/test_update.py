"""One update against a plain rendering of it; what a step that is left out leaves alone; precision and compilation."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from storage.torch.codecs import Tokens
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.loader import Batch
from trainer.loop.losses import LatentScale, Losses, losses
from trainer.loop.non_finite import NonFiniteError, NonFiniteSteps
from trainer.loop.readback import Readback
from trainer.loop.step import DECILES, StepNumbers, TrainingState, build, train_step
from trainer.models.transformer import Geometry
from trainer.ranks import arithmetic
from trainer.ranks.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
SCALE = LatentScale(scale=0.5, shift=0.0)
GEOMETRY = Geometry(
    kind="sit",
    input_size=8,
    channels=4,
    patch=2,
    width=32,
    depth=3,
    heads=2,
    n_classes=5,
    targets=((1, 24), (2, 12)),
    projector_width=16,
)


def config(**changes: Any) -> TrainConfig:
    small = {"precision": "fp32", "loss.projection_weight": (0.5, 0.25), "data.features": ("a", "b"), "optim.clip": 0.2}
    return override(preset("sit-tiny-2"), small | changes)


def parts(**changes: Any) -> TrainingState:
    return build(config(**changes), GEOMETRY, SCALE, WORLD)


def batch(step: int = 0, n: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.arange(n) + 100 * step
    moments = torch.cat([normal(n, 4, 8, 8), normal(n, 4, 8, 8).abs()], dim=1)
    return Batch(
        step=step,
        rows=rows,
        labels=rows % 5,
        moments=moments.half(),
        targets=(Tokens(normal(n, 16, 24).half()), Tokens(normal(n, 16, 12).half())),
        stall_s=0.5,
    )


def tensors(of: TrainingState) -> dict[str, Tensor]:
    moments = {
        f"{i} {name}": value for i, state in of.optimizer.state_dict()["state"].items() for name, value in state.items()
    }
    return {name: value.clone() for name, value in {**of.model.state_dict(), **moments}.items()}


def test_an_update_is_adamw_on_the_clipped_gradient() -> None:
    """Against torch's unfused optimiser and clipping, in three steps; the average follows its recurrence."""
    ours = parts()
    model = copy.deepcopy(ours.model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=False, foreach=False,
    )  # fmt: skip
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        numbers, of_batch = train_step(ours, batch(step))
        of = losses(model, batch(step), SCALE, config(), GEOMETRY)
        loss = of.denoising.mean() + 0.5 * of.alignments[:, 0].mean() + 0.25 * of.alignments[:, 1].mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        want = [of.denoising.mean().item(), norm.item(), *of.alignments.mean(0).tolist()]
        assert numbers.losses.tolist() == pytest.approx(want, rel=1e-5)
        assert norm > 0.2
        torch.testing.assert_close(of_batch.denoising, of.denoising.detach())
        assert not of_batch.denoising.requires_grad
        for name, value in model.state_dict().items():
            averaged[name] += (1 - 0.99) * (value - averaged[name])
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.ema.state_dict()[name], averaged[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_micro_batches_are_the_batch(n: int) -> None:
    whole, cut = parts(), parts(accumulate=n)
    for step in range(2):
        want, got = train_step(whole, batch(step)), train_step(cut, batch(step))
        torch.testing.assert_close(got[0].packed(), want[0].packed(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1].denoising, want[1].denoising)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(cut)[name], value, atol=1e-4, rtol=1e-3)


def test_a_batch_is_split_in_order() -> None:
    whole = batch()
    cut = whole.split(3)
    assert [len(part.rows) for part in cut] == [4, 4, 4]
    assert torch.equal(torch.cat([part.rows for part in cut]), whole.rows)
    assert torch.equal(torch.cat([part.targets[1].values for part in cut]), whole.targets[1].values)
    assert torch.equal(torch.cat([part.moments for part in cut]), whole.moments)
    assert sum(part.stall_s for part in cut) == whole.stall_s


def test_losses_by_time_are_those_of_the_samples() -> None:
    numbers, of_batch = train_step(parts(), batch(n=64))
    deciles = np.minimum((of_batch.times * DECILES).numpy().astype(int), DECILES - 1)
    want = np.stack([np.bincount(deciles, of_batch.denoising, DECILES), np.bincount(deciles, minlength=DECILES)])
    np.testing.assert_allclose(numbers.by_time, want, rtol=1e-6)
    again = StepNumbers.unpack(Readback(numbers.packed()).wait(), GEOMETRY)
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(numbers).values(), strict=True))


@pytest.mark.parametrize("which", ["moments", "targets"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(which: str) -> None:
    ours = parts()
    train_step(ours, batch(0))
    before = tensors(ours)
    bad = batch(1)
    (bad.moments if which == "moments" else bad.targets[0].values)[3] = torch.inf
    numbers, of_batch = train_step(ours, bad)
    assert not numbers.losses.isfinite().all()
    after = tensors(ours)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    guard = NonFiniteSteps(budget=1)
    rows = bad.rows
    assert guard.leave_out(1, numbers, of_batch, rows, WORLD, 1.0).endswith(
        "rows [103]; left out, 1 of at most 1 (--max-skipped)"
    )
    with pytest.raises(NonFiniteError, match=r"^step 1: .*rows \[103\].*Such steps: 2, --max-skipped 1"):
        guard.leave_out(1, numbers, of_batch, rows, WORLD, 1.0)
    train_step(ours, batch(2))
    assert not torch.equal(tensors(ours)["final_layer.linear.weight"], before["final_layer.linear.weight"])


def test_a_loss_that_overflows_though_its_gradient_does_not_is_left_out_too() -> None:
    """(2e19)² is no float32, its derivative is."""
    ours = parts(**{"optim.clip": 1e30})
    with torch.no_grad():
        ours.model.final_layer.linear.bias.fill_(2e19)
    before = tensors(ours)
    numbers, _ = train_step(ours, batch())
    assert numbers.losses[0].isinf()
    assert all(torch.equal(tensors(ours)[name], value) for name, value in before.items())


def test_an_overflow_of_the_loss_scale_is_named_and_not_counted() -> None:
    ours = parts(precision="fp16")
    ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 2.0**40})
    before = ours.model.state_dict()["final_layer.linear.weight"].clone()
    numbers, of_batch = train_step(ours, batch())
    assert of_batch.denoising.isfinite().all()
    assert not numbers.losses[1].isfinite()
    assert torch.equal(ours.model.state_dict()["final_layer.linear.weight"], before)
    assert ours.scaler.get_scale() == 2.0**39
    guard = NonFiniteSteps(budget=0)
    told = guard.leave_out(0, numbers, of_batch, batch().rows, WORLD, ours.scaler.get_scale())
    assert told.endswith("left out, the loss scale is now 5.49756e+11")
    assert guard.skipped == 0
    with pytest.raises(NonFiniteError):
        guard.leave_out(0, numbers, of_batch, batch().rows, WORLD, 0.5)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_precisions_agree_with_float32(precision: str) -> None:
    exact, other = parts(), parts(precision=precision)
    if precision == "fp16":
        other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 128.0})
    for step in range(3):
        want, got = train_step(exact, batch(step))[0], train_step(other, batch(step))[0]
        torch.testing.assert_close(got.losses, want.losses, rtol=0.05, atol=5e-3)
    assert all(value.dtype == torch.float32 for value in other.model.state_dict().values())


def test_switches_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        arithmetic.set_arithmetic(config(precision="tf32", deterministic=True))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        train_step(parts(), batch())  # every kernel has a deterministic form
    finally:
        arithmetic.set_arithmetic(config())
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_model_s_arithmetic_ends_with_it(precision: str) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with arithmetic.model_arithmetic(precision, torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Quadro P400", None),
    ],
)
def test_the_peak_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, name: str, tflops: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = arithmetic.peak_flops(torch.device("cuda"))
    assert peak == (None if tflops is None else tflops * 1e12)
    assert arithmetic.peak_flops(torch.device("cpu")) is None


@pytest.mark.slow
def test_a_compiled_step_computes_the_same_in_four_graphs() -> None:
    """A compiler for the CPU is needed. One for all blocks, one for the losses, two for draws: of one step, of any."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = parts(), parts(compile=True)
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    for step in range(4):
        want, got = train_step(plain, batch(step))[0], train_step(compiled, batch(step))[0]
        torch.testing.assert_close(got.losses, want.losses, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_losses_joined_are_in_order() -> None:
    of = Losses(denoising=torch.arange(6.0), alignments=torch.arange(12.0).view(6, 2), times=torch.rand(6))
    halves = [
        Losses(**{f.name: getattr(of, f.name)[cut] for f in dataclasses.fields(of)}) for cut in (slice(3), slice(3, 6))
    ]
    joined = Losses.joined(halves)
    assert all(torch.equal(getattr(joined, f.name), getattr(of, f.name)) for f in dataclasses.fields(of))
