"""DiT^DH agrees with the public implementation: models, loss, samplers, autoguidance; and a whole step in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.methods import method, on_imagenet
from storage.base.errors import UserError
from tests.trainer import plain
from tests.trainer.reference import GEOMETRIES, WEAKER, load_reference, reference_model, reference_state
from tests.trainer.test_rit import batch_of
from tests.trainer.test_transformer import randomised
from trainer.config.presets import preset
from trainer.config.sample import SampleConfig
from trainer.config.schema import LossConfig
from trainer.config.tree import override
from trainer.data.latent_scale import LatentScale
from trainer.loop import random_keys
from trainer.loop.losses import losses
from trainer.models.make import make_model
from trainer.models.transformer import DiffusionTransformer
from trainer.objectives import OBJECTIVES
from trainer.objectives.sampling import sample
from trainer.objectives.sit import shifted

GEOMETRY = GEOMETRIES["ditdh"]
SHIFT = math.sqrt(768 * 16 * 16 / 4096)
objective = OBJECTIVES["ditdh"]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("ditdh")


@pytest.fixture(scope="module")
def weaker() -> DiffusionTransformer:
    model = make_model(WEAKER)
    model.load_state_dict(reference_state("ditdh", "ag_state/"))
    return model


def test_names_and_shapes_are_the_public_checkpoints() -> None:
    expected = {name: value.shape for name, value in reference_state("ditdh").items()}
    assert {name: value.shape for name, value in make_model(GEOMETRY).state_dict().items()} == expected
    assert torch.equal(make_model(GEOMETRY).pos_embed, reference_state("ditdh")["pos_embed"])


def test_outputs(reference: dict[str, Tensor], weaker: DiffusionTransformer) -> None:
    with torch.no_grad():
        outputs = [
            model(reference["x"], reference["t"], reference["y"])[0] for model in (reference_model("ditdh"), weaker)
        ]
    torch.testing.assert_close(outputs[0], reference["v"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[1], reference["ag_v"], atol=1e-5, rtol=0)


def test_the_loss(reference: dict[str, Tensor]) -> None:
    loss = LossConfig(time_sampling="logit-normal", time_shift=SHIFT)
    t = objective.draw_times(torch.zeros(3), torch.special.ndtri(reference["loss_u"].double()), loss).float()
    torch.testing.assert_close(t, reference["loss_t"], atol=1e-6, rtol=0)
    uniform = dataclasses.replace(loss, time_sampling="uniform")
    of_uniform = objective.draw_times(reference["loss_u"], torch.zeros(3), uniform)
    torch.testing.assert_close(of_uniform, reference["loss_t_uniform"], atol=1e-6, rtol=0)
    x, noise = reference["latents"], reference["loss_noise"]
    x_t = objective.perturb(x, noise, t, loss)
    with torch.no_grad():
        output, _ = reference_model("ditdh")(x_t, t, reference["y"])
    of_samples = objective.denoising_loss(output, x, noise, x_t, t, loss)
    torch.testing.assert_close(of_samples, reference["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ode", "ode_cfg", "ode_ag"])
def test_the_samplers(reference: dict[str, Tensor], weaker: DiffusionTransformer, name: str) -> None:
    """N points are N − 1 calls, and the last level is S_s(0.001)."""
    models = [reference_model("ditdh"), weaker]
    n_points, scale, low, high = reference[f"{name}_args"].tolist()
    config = SampleConfig(
        sampler="ode", steps=int(n_points) - 1, shift=SHIFT, end=0.001, guidance=scale, guidance_low=low,
        guidance_high=high,
    )  # fmt: skip
    times = shifted(torch.linspace(1, 0.001, int(n_points), dtype=torch.float64), SHIFT).float()
    torch.testing.assert_close(times, reference["times_ode"], atol=1e-6, rtol=0)
    called: list[int] = []

    def predict(of: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        called.append(of)
        return models[of](x, t, y)[0]

    with torch.no_grad():
        drawn = sample(
            lambda x, t, y: predict(0, x, t, y), reference["xT"], reference["ys"], int(reference["null_label"]), config,
            "linear", lambda step: torch.zeros(0), objective=objective,
            weaker=(lambda x, t, y: predict(1, x, t, y)) if name == "ode_ag" else None,
        )  # fmt: skip
    assert called == ([0, 1] * 5 if name == "ode_ag" else [0] * 5)
    torch.testing.assert_close(drawn.float(), reference[name], atol=1e-5, rtol=1e-5)


def test_initialisation() -> None:
    """PyTorch's own of linear layers, xavier of patches, N(0, 0.02) of conditions, zero of what blocks add."""
    torch.manual_seed(0)
    model = make_model(dataclasses.replace(GEOMETRY, width=192, head_width=256, n_classes=300))
    state = model.state_dict()
    assert not any(value.any() for name, value in state.items() if "adaLN_modulation" in name)
    assert not state["final_layer.linear.weight"].any()
    assert not model(torch.randn(2, 24, 4, 4), torch.rand(2), torch.tensor([1, 2]))[0].any()
    assert state["t_embedder.W"].std().item() == pytest.approx(1, rel=0.15)
    assert not model.t_embedder.get_parameter("W").requires_grad
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
    for name, fan_in in (("blocks.0.attn.qkv", 192), ("blocks.3.mlp.w12", 256), ("s_projector", 192)):
        for kind in ("weight", "bias"):
            bound = 1 / math.sqrt(fan_in)  # U(±1/√fan_in), of the bias too
            assert 0.97 * bound < state[f"{name}.{kind}"].abs().max() <= bound, name
    for name, width in (("s_embedder", 192), ("x_embedder", 256)):
        bound = math.sqrt(6 / (24 + width))
        assert 0.97 * bound < state[f"{name}.proj.weight"].abs().max() <= bound
        assert not state[f"{name}.proj.bias"].any()


def test_sizes_are_the_published_ones() -> None:
    """DiT^DH-XL: 1152 × 28 and 2048 × 2, 839 M parameters; DiT^DH-S: 384 × 12 and 2048 × 2."""
    with torch.device("meta"):
        model = make_model(on_imagenet(method("ditdh-xl-1")))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 839
    config = method("ditdh-xl-1")
    assert (config.loss.time_shift, config.sample.shift) == pytest.approx((SHIFT, SHIFT))
    assert (config.batch, config.optim.lr, config.optim.beta2, config.ema_decay) == (1024, 2e-4, 0.95, 0.9995)
    assert (config.optim.final_lr, config.optim.decay_from, config.optim.decay_until) == (2e-5, 50045, 1000911)
    assert (config.sample.steps, config.sample.end, config.precision) == (49, 0.001, "fp32")
    small = method("ditdh-s-1").model
    assert (small.width, small.depth, small.head_width, small.head_depth) == (384, 12, 2048, 2)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "patch": 2}])
def test_every_parameter_matters(changes: dict[str, Any]) -> None:
    geometry = dataclasses.replace(GEOMETRY, **changes, targets=((2, 12),))
    model = randomised(geometry)
    x = torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(1))
    output, (projection,) = model(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 10]))
    assert output.shape == x.shape
    (output.square().sum() + projection.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name not in ("pos_embed", "t_embedder.W"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_losses_and_every_gradient_agree_with_float64() -> None:
    small = {
        "model.depth": 3, "model.width": 48, "model.heads": 4, "model.align_block": (2,), "model.head_width": 64,
        "model.head_heads": 4, "seed": 11, "loss.label_dropout": 0.5, "loss.time_shift": SHIFT,
    }  # fmt: skip
    config = override(preset("ditdh-xl-1"), small)
    model, batch = randomised(GEOMETRY), dataclasses.replace(batch_of(6), class_tokens=None)
    of_batch = losses(model, batch, LatentScale(scale=1.0, shift=0.0, has_posterior=False), config, GEOMETRY)
    of_batch.total(config).backward()

    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    seed, step, rows = config.seed, batch.step, batch.rows
    x = batch.moments.double()
    noise = random_keys.normal(seed, "noise", step, rows, (24, 4, 4)).double()
    r = 1 / (1 + torch.exp(-random_keys.normal(seed, "time", step, rows, (1,))[:, 0].double()))
    t = SHIFT * r / (1 + (SHIFT - 1) * r)
    dropped = random_keys.uniform(seed, "label-dropout", step, rows) < 0.5
    labels = torch.where(dropped, GEOMETRY.n_classes, batch.labels)
    output = plain.ditdh(weights, GEOMETRY, plain.interpolant(x, noise, t, "linear"), t, labels)
    denoising = plain.velocity_losses(output, x, noise, t, "linear")
    denoising.mean().backward()

    torch.testing.assert_close(of_batch.denoising.double(), denoising, atol=1e-5, rtol=1e-4)
    plain.assert_gradients_agree(model, weights)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.head_width": 0}, "--model.head-width must be at least 1, got 0"),
        ({"model.head_heads": 3}, "--model.head-heads must divide --model.head-width, got 3 and 2048"),
        ({"model.context": 3}, "--model.context is of --model.kind rit; leave it at 0 with ditdh"),
        ({"model.class_token": True}, "--model.class-token true goes with --model.kind sit or rit"),
        ({"loss.class_noise": "mean"}, "--loss.class-noise mean and --sample.class-noise mean are of --model.kind rit"),
        ({"sample.sampler": "sde"}, r"--sample.end must be in \[0, 1\), and 0 but for --sample.sampler ode, got 0.001"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        override(preset("ditdh-xl-1"), changes)
