"""What a GPU would be asked to do, on tensors that only say that they are on one (PyTorch's fake tensors).

They have shapes, dtypes and a device, and no numbers. So an operation on tensors of two devices fails as it would on a
GPU, a wait for a number (`.item()`, `if tensor:`) fails too, and models of full size cost nothing. What they cannot
show is left to `trainer/test_cuda.py`: numbers, streams, autocast, and the backward pass, for which gradients of the
parameters' shapes stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from pipeline.config import PrecomputeConfig
from pipeline.encode import UnitEncoder
from pipeline.encoders import registry, vae, vision
from pipeline.encoders.tiny import RESOLUTION
from pipeline.plan import plan_groups
from pipeline.quantise import quantise
from storage import StoreLayout
from trainer import update
from trainer.config_tree import override
from trainer.dequantise import dequantise
from trainer.distributed import World
from trainer.loader import Batch
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.objectives import diffusion
from trainer.presets import preset
from trainer.sampling import sample
from trainer.step import LatentScale

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GPU = torch.device("cuda", 0)
B = 16  # samples
FEATURES_WIDTH = 768


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor that is made meanwhile is a fake one."""

    def convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`Module._apply` by replacement; PyTorch's swaps tensors, which fakes refuse."""
        for child in module.children():
            convert(child, function)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = function(parameter.detach())
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
        return module

    monkeypatch.setattr(nn.Module, "_apply", convert)
    monkeypatch.setattr(diffusion, "_schedules", {})  # which would outlive the fakes in it
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def geometry(name: str) -> Geometry:
    model, (target,) = preset(name).model, preset(name).targets
    return Geometry(
        kind=model.kind,
        input_size=32,
        channels=4,
        patch=model.patch,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        n_classes=1000,
        targets=((target.block, FEATURES_WIDTH),),
        projector_width=model.projector_width,
    )


def a_batch(step: int) -> Batch:
    q, scale = quantise(torch.randn(B, 256, FEATURES_WIDTH, device=GPU))
    return Batch(
        step=step,
        rows=torch.arange(B, device=GPU),
        labels=torch.arange(B, device=GPU),
        moments=torch.randn(B, 8, 32, 32, device=GPU).half(),
        targets=(dequantise(q, scale),),
        stall_s=0.0,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["sit-xl-2", "dit-xl-2"])
def test_a_step_stays_on_its_device_and_waits_for_nothing(
    fakes: None, monkeypatch: pytest.MonkeyPatch, name: str, accumulate: int
) -> None:
    config = override(preset(name), {"precision": "fp32", "accumulate": accumulate, "optim.clip": 1.0})
    parts = update.build(config, geometry(name), LatentScale(scale=0.18, shift=0.0), World(rank=0, size=1, device=GPU))

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU
        for parameter in parts.model.parameters():
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    for step in range(2):  # the second finds the optimiser's state there
        numbers, losses = update.train_step(parts, a_batch(step))
        assert {numbers.packed().device, losses.denoising.device, losses.alignments.device} == {GPU}
    assert losses.denoising.shape == (B,)
    averaged, moments = parts.ema.model.parameters(), parts.optimizer.state.values()
    assert {p.device for p in averaged} == {m["exp_avg"].device for m in moments} == {GPU}


def test_a_tensor_of_the_host_and_a_wait_are_noticed(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests here could not fail."""
    config = override(preset("sit-tiny-2"), {"precision": "fp32"})
    parts = update.build(
        config, geometry("sit-tiny-2"), LatentScale(scale=1, shift=0.0), World(rank=0, size=1, device=GPU)
    )
    batch = a_batch(0)
    losses = update.losses

    def wrong(*arguments: Any) -> Any:
        return losses(*arguments).total(config) + torch.ones(2)

    monkeypatch.setattr(update, "losses", wrong)
    with pytest.raises(RuntimeError, match=r"two devices|same device"):
        update.train_step(parts, batch)
    monkeypatch.setattr(update, "losses", lambda *arguments: losses(*arguments).denoising.mean().item())
    with pytest.raises(DataDependentOutputException):
        update.train_step(parts, batch)


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_a_sampler_stays_on_its_device_and_waits_for_nothing(
    fakes: None, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    linspace = torch.linspace

    def on_the_host(*arguments: Any, **more: Any) -> Tensor:
        with unset_fake_temporarily():
            return linspace(*arguments, **more)

    monkeypatch.setattr(torch, "linspace", on_the_host)  # the times of the steps
    model = DiffusionTransformer(geometry("sit-b-2")).to(GPU)
    config = override(preset("sit-b-2"), {"sample.sampler": sampler, "sample.steps": 3, "sample.guidance": 1.8}).sample
    x, y = torch.randn(B, 4, 32, 32, device=GPU), torch.arange(B, device=GPU)
    drawn = sample(
        lambda x, t, y: model(x, t, y)[0], x, y, 1000, config, "linear", lambda step: torch.randn(x.shape, device=GPU)
    )
    assert (drawn.device, drawn.dtype, drawn.shape) == (GPU, torch.float64, x.shape)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_units_are_encoded_where_their_images_are(
    fakes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    for module in (vae, vision):  # whether all numbers are finite is asked of the numbers
        monkeypatch.setattr(module, "to_float16", lambda x, what: x.half())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    layout = StoreLayout(n_rows=B, views=("original", "hflip"), resolution=RESOLUTION, shard_rows=B)
    asked = PrecomputeConfig(
        data=str(tmp_path), store=str(tmp_path), latents="tiny-vae", features="tiny-vit", features_dtype=dtype,
        resolution=RESOLUTION, flip=True,
    )  # fmt: skip
    groups = plan_groups(asked, layout, "digest")
    encoder = UnitEncoder(tmp_path, groups, {}, batch=5, n_threads=1, run_id="")
    for group in groups:
        with unset_fake_temporarily():
            loaded: Any = registry.load(group.spec, resolution=RESOLUTION, device=torch.device("cpu"))
        loaded.model.to(GPU)
        loaded.device = GPU
        encoder._encoders[group.layout.path] = loaded
    images = torch.zeros(B, RESOLUTION, RESOLUTION, 3, dtype=torch.uint8, device=GPU)
    present = np.delete(np.arange(B), 3)
    for group in groups:
        arrays: Any = encoder.encode(group.layout.path, images, present, 5)
        assert {name: (values.device, tuple(values.shape)) for name, values in arrays.items()} == {
            array.name: (GPU, array.shape) for array in group.layout.arrays
        }
