"""What a GPU would be asked to do, on tensors that only say that they are on one (PyTorch's fake tensors).

They have shapes, dtypes and a device, and no numbers. So an operation on tensors of two devices fails as it would on a
GPU, a wait for a number (`.item()`, `if tensor:`) fails too, and models of full size cost nothing; copies between
devices, for which a host waits as well, are counted. What they cannot show is left to `trainer/test_cuda.py`: numbers,
streams, autocast, and the backward pass, for which gradients of the parameters' shapes stand here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline.encode
from pipeline.config import PrecomputeConfig
from pipeline.encode import UnitEncoder
from pipeline.encoders import registry
from pipeline.encoders.tiny import RESOLUTION
from pipeline.plan import plan_groups
from storage import StoreLayout
from storage.codecs import CODECS, Codec
from storage.codecs.int8 import INT8
from storage.torch.codecs import Tokens, twin_of
from tests.slow import slow_but
from tests.trainer.test_transformer import imagenet_config
from trainer.alignment.cosine import Cosine
from trainer.alignment.irepa import IREPA
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.feature_latents import on_grid
from trainer.data.loader import Batch, behind_class_token
from trainer.evaluation.generate.draw import draw_latents
from trainer.loop import step as update
from trainer.loop.losses import LatentScale
from trainer.models.make import make_model
from trainer.models.transformer import Geometry
from trainer.objectives import dit as diffusion
from trainer.objectives import sampling
from trainer.ranks.world import World
from trainer.run.settings import with_shifts

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GPU = torch.device("cuda", 0)
B = 16  # samples
OLD = [int(part) for part in torch.__version__.split("+")[0].split(".")[:2]] < [2, 14]


class Copies(TorchDispatchMode):
    """Counts the copies between devices for which the host waits."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        out = function(*arguments, **(more or {}))
        name, waits = str(function), not (more or {}).get("non_blocking", False)
        if name.startswith(("aten._to_copy", "aten.to.")) and waits:  # the latter within inference mode
            self.n += out.device != arguments[0].device
        if name.startswith("aten.copy_") and (len(arguments) < 3 or not arguments[2]):
            self.n += arguments[0].device != arguments[1].device
        if name.startswith(("aten.index.", "aten.index_put")):  # copied within
            self.n += sum(at is not None and at.device != arguments[0].device for at in arguments[1])
        return out


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor that is made meanwhile is a fake one."""
    if OLD:
        pytest.skip(f"fake tensors of torch {torch.__version__} may end the process: those of 2.8 do in a convolution")

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


def a_batch(step: int, geometry: Geometry, codec: Codec = INT8) -> Batch:
    """Targets, and latents that are features, as the loader makes them of codes; others are float16 in the store."""
    n, twin = geometry.grid**2, twin_of(codec)
    rows, views = torch.arange(B, device=GPU), torch.zeros(B, dtype=torch.int64, device=GPU)

    def decoded(width: int) -> Tokens:
        return twin.decode(twin.encode(torch.randn(B, n, width, device=GPU), rows, views), rows, views)

    targets = tuple(decoded(width) for _, width in geometry.targets)
    class_tokens = None
    if geometry.class_width:
        class_tokens = torch.randn(B, geometry.class_width, device=GPU).half()
        if geometry.aligns_class_token:
            targets = tuple(behind_class_token(target, class_tokens) for target in targets)
    if geometry.kind in OF_FEATURES:
        moments = on_grid(decoded(geometry.channels).values, (geometry.grid, geometry.grid))
    else:
        moments = torch.randn(B, 2 * geometry.channels, geometry.input_size, geometry.input_size, device=GPU).half()
    return Batch(
        step=step,
        rows=rows,
        labels=torch.arange(B, device=GPU),
        moments=moments,
        targets=targets,
        stall_s=0.0,
        class_tokens=class_tokens,
    )


FEATURES_WIDTH = 768
OF_FEATURES = ("rit", "ditdh")  # are learned by these
TWICE = ("sit", "dit", "stopped")  # the second step finds the optimiser's state there
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "sit": ("sit-{}-2", {}),
    "dit": ("dit-{}-2", {}),
    "patch 1": ("sit-{}-1", {}),
    "reg": ("sit-{}-2-reg", {}),
    "lightningdit": ("lightningdit-{}-1", {}),
    "rit": ("rit-{}-1", {"loss.projection_weight": (0.5,)}),
    "rit, shallow": (
        "rit-{}-1",
        {"loss.projection_weight": (0.5,), "model.depth": 3, "model.context_block": 2, "model.align_block": (2,)},
    ),
    "ditdh": ("ditdh-{}-1", {"loss.projection_weight": (0.5,)}),
    "irepa, kernel 1": ("sit-{}-2", {"loss.alignment": ("irepa:kernel=1",)}),
    "irepa, kernel 3": ("sit-{}-2", {"loss.alignment": ("irepa",)}),
    "stopped": ("sit-{}-2", {"loss.stop_alignment_at": 1}),
}


def map_of(geometry: Geometry) -> LatentScale:
    """One factor, or numbers of every channel and place and of the class token, in the host's memory as read."""
    if geometry.kind not in OF_FEATURES:
        return LatentScale(scale=0.18, shift=0.0)
    scale, shift = torch.rand(2, 1, geometry.channels, geometry.input_size, geometry.input_size)
    of_class = (torch.rand(geometry.class_width), torch.rand(geometry.class_width)) if geometry.class_width else None
    return LatentScale(scale=scale, shift=shift, has_posterior=False, of_class=of_class)


@pytest.mark.parametrize(
    ("size", "method", "accumulate"),
    [
        ("b", "sit", 2),
        pytest.param("b", "dit", 2, marks=pytest.mark.slow),
        *(("b", name, 1) for name in ("reg", "lightningdit", "stopped")),
        ("s", "ditdh", 1),
        ("xl", "rit, shallow", 1),
        *(pytest.param("b", name, 1, marks=pytest.mark.slow) for name in STEPS if name.startswith(("irepa", "patch"))),
        *(pytest.param("xl", name, n, marks=pytest.mark.slow) for name in ("sit", "dit") for n in (1, 2)),
        *(
            pytest.param("xl", name, 1, marks=pytest.mark.slow)
            for name in STEPS
            if name not in ("sit", "dit", "rit, shallow")
        ),
    ],
)
def test_a_step_stays_on_its_device_and_waits_for_nothing(
    fakes: None, monkeypatch: pytest.MonkeyPatch, size: str, method: str, accumulate: int
) -> None:
    spelling, changes = STEPS[method]
    name = spelling.format(size)
    config = override(preset(name), {"precision": "fp32", "accumulate": accumulate, "optim.clip": 1.0, **changes})
    geometry = imagenet_config(name, **changes)
    config = with_shifts(config, geometry.channels * geometry.input_size**2)
    parts = update.build(config, geometry, map_of(geometry), World(rank=0, size=1, device=GPU))

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU
        for parameter in parts.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    for step in range(1 + (method in TWICE)):
        batch = a_batch(step, geometry)
        if not config.aligns_at(step):
            parts = update.without_alignment(parts) if step and config.aligns else parts
            batch = dataclasses.replace(batch, targets=())
        with Copies() as copies:
            numbers, losses = update.train_step(parts, batch)
        assert copies.n == 0 or (method == "dit" and step == 0)  # DiT's schedule goes there once
        assert {numbers.packed().device, losses.denoising.device, losses.alignments.device} == {GPU}
    assert losses.denoising.shape == (B,)
    assert losses.class_denoising.shape == ((B,) if geometry.class_width else (0,))
    averaged, moments = parts.ema.model.parameters(), parts.optimizer.state.values()
    assert {p.device for p in averaged} == {m["exp_avg"].device for m in moments} == {GPU}
    resting = [p for p in parts.model.projectors.parameters() if p not in parts.optimizer.state]
    assert len(resting) == (6 if method == "stopped" else 0)


@pytest.mark.parametrize("spelling", list(CODECS))
def test_decoding_and_aligning_stay_on_their_device_and_wait_for_nothing(fakes: None, spelling: str) -> None:
    twin, rows = twin_of(CODECS[spelling]), torch.arange(B, device=GPU)
    views, kinds = rows % 2, (Cosine(), IREPA())
    projection = torch.randn(B, 256, FEATURES_WIDTH, device=GPU, requires_grad=True)
    for step in range(2):  # tables go there once
        with Copies() as copies:
            stored = twin.encode(torch.randn(B, 256, FEATURES_WIDTH, device=GPU), rows, views)
            tokens = twin.decode(stored, rows, views)
            losses = [kind.loss(projection, kind.prepared(tokens)) for kind in kinds]
        assert copies.n == 0 or step == 0
    assert {tensor.device for tensor in (*stored.values(), *losses)} == {GPU}
    assert tokens.values.shape == (B, 256, FEATURES_WIDTH)


def test_a_tensor_of_the_host_and_a_wait_are_noticed(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests here could not fail."""
    config, geometry = override(preset("sit-s-2"), {"precision": "fp32"}), imagenet_config("sit-s-2")
    parts = update.build(config, geometry, LatentScale(scale=1, shift=0.0), World(rank=0, size=1, device=GPU))
    batch = a_batch(0, geometry)
    losses = update.losses

    def wrong(*arguments: Any) -> Any:
        return losses(*arguments).total(config) + torch.ones(2)

    monkeypatch.setattr(update, "losses", wrong)
    with pytest.raises(RuntimeError, match=r"two devices|same device"):
        update.train_step(parts, batch)
    monkeypatch.setattr(update, "losses", lambda *arguments: losses(*arguments).denoising.mean().item())
    with pytest.raises(DataDependentOutputException):
        update.train_step(parts, batch)
    with Copies() as copies:
        batch.moments.new_tensor([0.5])
        batch.moments[torch.arange(2)]
    assert copies.n == 2


@pytest.mark.parametrize(  # ddpm asks its schedule for all times before the first step
    ("name", "sampler"),
    [
        ("sit-b-2", "ode"),
        pytest.param("sit-b-2", "sde", marks=pytest.mark.slow),
        pytest.param("sit-b-1", "sde", marks=pytest.mark.slow),
        ("sit-b-2-reg", "sde"),
        pytest.param("lightningdit-b-1", "ode", marks=pytest.mark.slow),
    ],
)
def test_a_sampler_stays_on_its_device_and_waits_for_nothing(
    fakes: None, monkeypatch: pytest.MonkeyPatch, name: str, sampler: str
) -> None:
    def on_the_host(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **more: Any) -> Tensor:
            with unset_fake_temporarily():
                return function(*arguments, **more)

        return run

    monkeypatch.setattr(torch, "linspace", on_the_host(torch.linspace))  # the times of the steps
    monkeypatch.setattr(sampling, "shifted", on_the_host(sampling.shifted))
    geometry = imagenet_config(name)
    model = make_model(geometry).to(GPU)
    changes = {"sample.sampler": sampler, "sample.steps": 3, "sample.guidance": 1.8, "precision": "fp32"}
    images = torch.arange(B, device=GPU)
    drawn = draw_latents(model, images, images, geometry, override(preset(name), changes), seed=0)
    shape = (B, geometry.channels, geometry.input_size, geometry.input_size)
    assert (drawn.device, drawn.dtype, drawn.shape) == (GPU, torch.float64, shape)


@pytest.mark.parametrize("dtype", slow_but(["float16", "int8", "rotated1", "rotated4"], ["float16", "rotated1"]))
def test_units_are_encoded_where_their_images_are(
    fakes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(pipeline.encode, "_wait_for", lambda stream: None)
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
        encoder.encode(group.layout.path, images, present, 5, 0)  # a codec's tables go there once
        with Copies() as copies:
            arrays: Any = encoder.encode(group.layout.path, images, present, 5, 0)
        assert copies.n == 1  # the rows', whatever the number of batches
        assert {name: (values.device, tuple(values.shape)) for name, values in arrays.items()} == {
            array.name: (GPU, array.shape) for array in group.layout.arrays
        }
