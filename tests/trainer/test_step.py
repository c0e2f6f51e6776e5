"""One whole training step, SiT and DiT with two alignment targets, against the equations in float64 (`plain.py`).

The step draws its numbers as ever; the rendering is given the same draws and does everything else by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.identity import LatentsIdentity
from storage.torch.codecs import Tokens
from tests.trainer import plain
from tests.trainer.test_transformer import KINDS, SMALL, randomised
from trainer.config.presets import preset
from trainer.config.schema import Kind, TrainConfig
from trainer.config.tree import override
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import LatentScale, draw, losses, sample_latents
from trainer.models.transformer import DiffusionTransformer, Geometry

SCALE = LatentScale(scale=0.7, shift=0.2)
WEIGHTS = (0.5, 0.25)


def config_of(kind: Kind, **changes: Any) -> TrainConfig:
    """Label dropout often enough that some of four labels are dropped and some are not."""
    settings = {
        "seed": 11,
        "precision": "fp32",
        "loss.projection_weight": WEIGHTS,
        "loss.label_dropout": 0.5,
        "model.align_block": tuple(block for block, _ in SMALL.targets),
    }
    return override(preset(f"{kind}-tiny-2"), {**settings, **changes})


def batch_of(geometry: Geometry, n: int, *, posterior: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(3)
    side, channels = geometry.input_size, geometry.channels
    moments = torch.randn(n, channels * (2 if posterior else 1), side, side, generator=generator)
    return Batch(
        step=5,
        rows=torch.arange(n) * 1000 + 7,
        labels=torch.arange(n) % geometry.n_classes,
        moments=moments.half(),
        targets=tuple(Tokens(torch.randn(n, 16, width, generator=generator).half()) for _, width in geometry.targets),
        stall_s=0.0,
    )


def plain_step(config: TrainConfig, geometry: Geometry, batch: Batch, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(denoising losses (B,), alignment losses (B, 2)) by the equations, from the step's own draws."""
    seed, step, rows = config.seed, batch.step, batch.rows
    shape = (geometry.channels, geometry.input_size, geometry.input_size)
    mean, std = batch.moments.double().chunk(2, dim=1)
    x = (mean + std * random_keys.normal(seed, "posterior", step, rows, shape).double() - SCALE.shift) * SCALE.scale
    noise = random_keys.normal(seed, "noise", step, rows, shape).double()
    uniform = random_keys.uniform(seed, "time", step, rows).double()
    dropped = random_keys.uniform(seed, "label-dropout", step, rows) < config.loss.label_dropout
    assert dropped.any()
    assert not dropped.all()
    labels = torch.where(dropped, geometry.n_classes, batch.labels)
    if geometry.kind == "dit":
        t = (uniform * 1000).long()
        output, projections = plain.transformer(p, geometry, plain.diffused(x, noise, t), t.double(), labels)
        denoising = plain.diffusion_losses(output, x, noise, t)
    else:
        if config.loss.time_sampling == "logit-normal":
            sigma = torch.exp(random_keys.normal(seed, "time", step, rows, (1,))[:, 0].double())
            linear = config.loss.path == "linear"
            uniform = sigma / (1 + sigma) if linear else torch.atan(sigma) * 2 / torch.pi
        shift = config.loss.time_shift
        uniform = shift * uniform / (1 + (shift - 1) * uniform)
        x_t = plain.interpolant(x, noise, uniform, config.loss.path)
        output, projections = plain.transformer(p, geometry, x_t, uniform, labels)
        denoising = plain.velocity_losses(output, x, noise, uniform, config.loss.path)
    prepared = [plain.prepared(y.values.double(), kind) for y, kind in zip(batch.targets, geometry.kinds, strict=True)]
    aligned = [plain.alignment(h, y) for h, y in zip(projections, prepared, strict=True)]
    return denoising, torch.stack(aligned, dim=1)


CASES = [
    ("sit", {}),
    ("sit", {"model.qk_norm": True}),
    ("sit", {"loss.path": "cosine", "loss.time_sampling": "logit-normal"}),
    ("sit", {"loss.time_sampling": "logit-normal", "loss.time_shift": 6.93}),
    ("dit", {}),
    ("dit", {"model.qk_norm": True}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_losses_and_every_gradient_agree_with_float64(kind: Kind, changes: dict[str, Any]) -> None:
    config = config_of(kind, **changes)
    geometry = dataclasses.replace(SMALL, kind=kind, qk_norm=config.model.qk_norm)
    model, batch = randomised(geometry), batch_of(geometry, 4)
    found = losses(model, batch, SCALE, config, geometry)
    found.total(config).backward()

    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    denoising, alignments = plain_step(config, geometry, batch, weights)
    total = denoising.mean() + WEIGHTS[0] * alignments[:, 0].mean() + WEIGHTS[1] * alignments[:, 1].mean()
    total.backward()

    torch.testing.assert_close(found.denoising.double(), denoising, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.alignments.double(), alignments, atol=1e-5, rtol=1e-4)
    assert found.total(config).item() == pytest.approx(total.item(), rel=1e-5)
    plain.assert_gradients_agree(model, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_logged_between_image_and_noise(kind: Kind) -> None:
    geometry = dataclasses.replace(SMALL, kind=kind)
    config = config_of(kind)
    times = losses(randomised(geometry), batch_of(geometry, 64), SCALE, config, geometry).times
    assert times.dtype == torch.float32
    assert 0 <= times.min() < 0.1
    assert 0.9 < times.max() < 1


def test_vanilla_has_no_alignment_and_the_same_denoising_loss() -> None:
    bare = dataclasses.replace(SMALL, targets=())
    aligned, vanilla = randomised(SMALL), DiffusionTransformer(bare)
    vanilla.load_state_dict({n: v for n, v in aligned.state_dict().items() if not n.startswith("projectors.")})
    batch = batch_of(SMALL, 4)
    config = config_of("sit", **{"loss.projection_weight": (0.0,)})
    found = losses(vanilla, dataclasses.replace(batch, targets=()), SCALE, config, bare)
    assert found.alignments.shape == (4, 0)
    assert torch.equal(found.total(config), found.denoising.mean())
    with_targets = losses(aligned, batch, SCALE, config_of("sit"), SMALL)
    torch.testing.assert_close(found.denoising, with_targets.denoising)


def test_a_deterministic_autoencoder_s_latents_are_scaled_and_nothing_is_drawn() -> None:
    scale = LatentScale.of(LatentsIdentity(latent_scale_factor=0.7, latent_shift_factor=0.2, posterior=False))
    batch = batch_of(SMALL, 4, posterior=False)
    assert torch.equal(sample_latents(batch, scale, seed=0), (batch.moments.float() - 0.2) * 0.7)
    assert LatentScale.of(LatentsIdentity(latent_scale_factor=1.0, latent_shift_factor=0.0)).has_posterior


@pytest.mark.parametrize("kind", ["sit", pytest.param("dit", marks=pytest.mark.slow)])
def test_a_step_is_one_graph(kind: Kind) -> None:
    """Draws, noise and losses of both kinds can be compiled together with the model."""
    torch.compiler.reset()
    geometry = dataclasses.replace(SMALL, kind=kind)
    model, config = randomised(geometry), config_of(kind)

    def total(batch: Batch) -> Tensor:
        return losses(model, batch, SCALE, config, geometry).total(config)

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    for step in (5, 6):
        batch = dataclasses.replace(batch_of(geometry, 4), step=step)
        torch.testing.assert_close(compiled(batch), total(batch))


@pytest.mark.parametrize("kind", ["sit", pytest.param("dit", marks=pytest.mark.slow)])
def test_draws_are_compiled_for_all_steps(kind: Kind) -> None:
    """Not anew for each: one graph for the first step and one for every other, with the numbers of the plain draws."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = config_of(kind)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (7, 8, 9, 400_000):
        batch = dataclasses.replace(batch_of(SMALL, 4), step=step)
        found, want = compiled(batch, SCALE, config, SMALL), draw(batch, SCALE, config, SMALL)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
