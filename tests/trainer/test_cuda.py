"""What only a GPU can show: the ring of pinned buffers, kernels against the CPU's, no waiting, resumes bit for bit."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from storage.codecs import CODECS
from storage.codecs.int8 import INT8
from storage.codecs.int8 import numbers as decode
from tests.stores import FEATURES, LATENTS, make_store
from tests.trainer.runs import assert_same_run, command
from tests.trainer.test_update import GEOMETRY, SCALE, batch, config, tensors
from trainer.config.data import DataConfig
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.groups import open_data
from trainer.data.loader import Batch, Loader
from trainer.data.resident import open_rows
from trainer.loop.ema import EMA
from trainer.loop.optimiser import make_optimizer
from trainer.loop.readback import Readback
from trainer.loop.step import TrainingState, build, train_step
from trainer.models.transformer import DiffusionTransformer
from trainer.ranks.arithmetic import set_arithmetic
from trainer.ranks.parallel import replicate, shard, whole
from trainer.ranks.world import World

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: streams, pinned copies, fused kernels, TF32"
)
GPU = torch.device("cuda", 0)
BUSY_CYCLES = 20_000_000  # some 10 ms of a GPU's clock


@pytest.fixture(autouse=True)
def _arithmetic_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def parts(device: torch.device = GPU, **changes: Any) -> TrainingState:
    set_arithmetic(config(**changes))
    return build(config(**changes), GEOMETRY, SCALE, World(rank=0, size=1, device=device))


def on_gpu(of: Batch) -> Batch:
    return dataclasses.replace(
        of,
        rows=of.rows.to(GPU),
        labels=of.labels.to(GPU),
        moments=of.moments.to(GPU),
        targets=tuple(target.each(lambda tensor: tensor.to(GPU)) for target in of.targets),
    )


@pytest.mark.parametrize("codec", [None, INT8])
def test_the_ring_gives_the_store_s_numbers_while_the_gpu_is_behind(tmp_path: Path, codec: Any) -> None:
    """The GPU is kept busy in front of each use, and the host runs ahead through many turns of the smallest ring."""
    arrays = make_store(tmp_path / "s", codec=codec)
    data = open_data(override(preset("sit-tiny-2"), {"store": tmp_path / "s"}))
    seen = []
    with Loader(
        data, seed=3, batch=8, start=0, stop=24, rank=0, world_size=1, device=GPU, prefetch=1
    ) as batches:  # fmt: skip
        for got in batches:
            torch.cuda._sleep(BUSY_CYCLES)
            seen.append((got.rows.clone(), got.labels.clone(), got.moments.clone(), got.targets[0].values.clone()))
    data.close()
    want = (
        arrays[FEATURES]["patches"] if codec is None else decode(*(arrays[FEATURES][n] for n in ("patches", "scale")))
    )
    assert len(seen) == 24
    for rows, labels, moments, target in seen:
        at = rows.cpu().numpy()
        np.testing.assert_array_equal(labels.cpu().numpy(), at % 5)
        np.testing.assert_array_equal(moments.cpu().numpy(), arrays[LATENTS]["moments"][at, 0])
        np.testing.assert_array_equal(target.cpu().numpy(), want[at, 0])


@pytest.mark.parametrize("kind", ["ram", "gpu"])
def test_resident_batches_are_the_streamed_ones(tmp_path: Path, kind: str) -> None:
    make_store(tmp_path / "s", n_views=2, failed_rows=[3], codec=CODECS["rotated2"])
    data = open_data(override(preset("sit-tiny-2"), {"store": tmp_path / "s"}))
    seen: list[list[torch.Tensor]] = []
    with closing(
        open_rows(data, DataConfig(resident=kind), World(rank=0, size=1, device=GPU), with_targets=True)
    ) as resident:
        for rows in (resident, None):
            with Loader(
                data, seed=3, batch=8, start=0, stop=12, rank=0, world_size=1, device=GPU, prefetch=1, rows=rows
            ) as batches:
                seen.append([])
                for got in batches:
                    torch.cuda._sleep(BUSY_CYCLES)
                    seen[-1] += [got.rows.clone(), got.moments.clone(), got.targets[0].values.clone()]
    data.close()
    assert len(seen[0]) == len(seen[1]) == 36
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 0.02), ("bf16", 0.05), ("fp16", 0.05)])
@pytest.mark.parametrize("compile", [False, True])
def test_steps_are_the_cpu_s(precision: str, tolerance: float, compile: bool) -> None:
    """Losses, gradient norm and weights after three steps of the fused optimiser."""
    cpu, gpu = parts(torch.device("cpu")), parts(precision=precision, compile=compile)
    if precision == "fp16":
        gpu.scaler.load_state_dict({**gpu.scaler.state_dict(), "scale": 128.0})
    for step in range(3):
        want, got = train_step(cpu, batch(step))[0], train_step(gpu, on_gpu(batch(step)))[0]
        torch.testing.assert_close(got.losses.cpu(), want.losses, rtol=tolerance, atol=tolerance / 10)
    if precision == "fp32":
        for name, value in gpu.model.state_dict().items():
            torch.testing.assert_close(value.cpu(), cpu.model.state_dict()[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(precision: str) -> None:
    ours = parts(precision=precision)
    if precision == "fp16":
        ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 128.0})
    train_step(ours, on_gpu(batch(0)))
    before, scale = tensors(ours), ours.scaler.get_scale()
    bad = on_gpu(batch(1))
    bad.targets[0].values[3] = torch.inf
    assert not train_step(ours, bad)[0].losses.isfinite().all()
    assert all(torch.equal(tensors(ours)[name], value) for name, value in before.items())
    assert ours.scaler.get_scale() == (scale / 2 if precision == "fp16" else 1.0)
    assert train_step(ours, on_gpu(batch(2)))[0].losses.isfinite().all()
    assert not torch.equal(tensors(ours)["final_layer.linear.weight"], before["final_layer.linear.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_host_does_not_wait_in_a_step(precision: str, accumulate: int) -> None:
    ours = parts(precision=precision, accumulate=accumulate)
    batches = [on_gpu(batch(step)) for step in range(2)]
    train_step(ours, batches[0])  # makes the optimiser's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        readback = Readback(train_step(ours, batches[1])[0].packed())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert readback.wait().isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_deterministic_resume_equals_the_unbroken_run(tmp_path: Path, precision: str) -> None:
    make_store(tmp_path / "s", n_rows=64)
    changes = {"device": "cuda", "precision": precision, "deterministic": True}
    for run, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        subprocess.run(command(tmp_path / "s", tmp_path / run, steps=steps, **changes), check=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of one GPU, so that the sharded and replicated paths run on NCCL."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=GPU)
    yield World(rank=0, size=1, device=GPU)
    dist.destroy_process_group()


def spread(parallel: str, precision: str, world: World) -> TrainingState:
    """`build`, which spreads over several ranks only, on the one there is."""
    of = config(precision=precision)
    torch.manual_seed(of.seed)
    model = DiffusionTransformer(GEOMETRY).to(GPU)
    ema = EMA(model, of.ema_decay)
    if parallel == "fsdp":
        for each in (model, ema.model):
            shard(each, world, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    return TrainingState(
        config=of, geometry=GEOMETRY, world=world, scale=SCALE, model=model,
        wrapped=replicate(model, world) if parallel == "ddp" else model, ema=ema,
        optimizer=make_optimizer(model, of.optim),
        scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16", init_scale=128.0),
    )  # fmt: skip


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_spread_gpu_is_one_gpu(parallel: str, precision: str, world: World) -> None:
    alone, ours = parts(precision=precision), spread(parallel, precision, world)
    if precision == "fp16":
        alone.scaler.load_state_dict({**alone.scaler.state_dict(), "scale": 128.0})
    for step in range(3):
        want, got = train_step(alone, on_gpu(batch(step)))[0], train_step(ours, on_gpu(batch(step)))[0]
        torch.testing.assert_close(got.losses, want.losses, rtol=1e-4 if precision == "fp32" else 0.02, atol=1e-3)
    if precision == "fp32":
        for name, value in ours.model.state_dict().items():
            torch.testing.assert_close(whole(value), alone.model.state_dict()[name], rtol=1e-3, atol=2e-4)
