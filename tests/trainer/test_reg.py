"""REG agrees with the public implementation: model, losses, initialisation, samplers; and a whole step in float64."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.order import ValidRows
from storage.torch.codecs import Tokens
from tests.trainer import plain
from tests.trainer.reference import GEOMETRIES, load_reference, reference_model, reference_state
from tests.trainer.test_step import SCALE, batch_of, config_of
from tests.trainer.test_transformer import SMALL
from trainer.config.sample import SampleConfig
from trainer.data.loader import behind_class_token
from trainer.loop import random_keys
from trainer.loop.losses import losses
from trainer.loop.opening import class_token_line
from trainer.models.make import make_model
from trainer.models.reg import join, split
from trainer.objectives.sampling import sample
from trainer.objectives.sit import interpolate, velocity_loss

GEOMETRY = GEOMETRIES["reg"]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("reg")


def test_names_and_shapes_are_the_public_checkpoints() -> None:
    expected = {name: value.shape for name, value in reference_state("reg").items()}
    assert {name: value.shape for name, value in make_model(GEOMETRY).state_dict().items()} == expected


def test_outputs_and_every_loss_term(reference: dict[str, Tensor]) -> None:
    model = reference_model("reg")
    with torch.no_grad():
        output, (projection,) = model(join(reference["x"], reference["cls"]), reference["t"], reference["y"])
    image, class_token = split(output, GEOMETRY)
    torch.testing.assert_close(image, reference["v"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_token, reference["v_cls"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projection, reference["projection/0"], atol=1e-5, rtol=1e-5)

    x, noise = (join(reference[a], reference[b]) for a, b in (("x", "cls"), ("loss_noise", "loss_cls_noise")))
    x_t, velocity = interpolate(x, noise, reference["loss_t"], "linear")
    with torch.no_grad():
        output, (projection,) = model(x_t, reference["loss_t"], reference["y"])
    of_image, of_class = zip(split(output, GEOMETRY), split(velocity, GEOMETRY), strict=True)
    denoising, class_denoising = velocity_loss(*of_image), velocity_loss(*of_class)
    (kind,) = GEOMETRY.kinds
    aligned = kind.loss(projection, kind.prepared(Tokens(reference["target/0"]))).mean()
    torch.testing.assert_close(denoising, reference["denoising_loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_denoising, reference["cls_denoising_loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(aligned, reference["projection_loss"], atol=1e-6, rtol=0)
    of_image_weight, of_class_weight, of_alignment = reference["loss_weights"].float()
    total = of_image_weight * denoising.mean() + of_class_weight * class_denoising.mean() + of_alignment * aligned
    torch.testing.assert_close(total, reference["total_loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sde", "sde_cfg", "sde_cfg_cls0"])
def test_the_sampler_carries_the_class_token(reference: dict[str, Tensor], name: str) -> None:
    model = reference_model("reg")
    steps, guidance, of_class, low, high, cosine = reference[f"{name}_args"].tolist()
    assert cosine == 0
    config = SampleConfig(
        sampler="sde", steps=int(steps), guidance=guidance, guidance_low=low, guidance_high=high,
        guidance_class=of_class,
    )  # fmt: skip
    with torch.no_grad():
        drawn = sample(
            lambda x, t, y: model(x, t, y, with_projections=False)[0],
            join(reference["xT"], reference["clsT"]),
            reference["y"],
            1000,
            config,
            "linear",
            lambda step: join(reference["sde_noise"][step], reference["sde_cls_noise"][step]),
            class_width=GEOMETRY.class_width,
        )
    image, class_token = split(drawn, GEOMETRY)
    torch.testing.assert_close(image, reference[name], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(class_token, reference[f"{name}_cls"], atol=2e-5, rtol=1e-5)


def test_a_class_token_is_guided_as_the_image_unless_a_scale_is_given(reference: dict[str, Tensor]) -> None:
    model = reference_model("reg")

    def drawn(of_class: float) -> Tensor:
        config = SampleConfig(sampler="ode", steps=2, guidance=2.3, guidance_class=of_class)
        x, y = join(reference["xT"], reference["clsT"]), reference["y"]
        with torch.no_grad():
            return sample(
                lambda x, t, y: model(x, t, y)[0], x, y, 1000, config, "linear", lambda step: x,
                class_width=GEOMETRY.class_width,
            )  # fmt: skip

    assert SampleConfig().guidance_class == -1
    assert torch.equal(drawn(-1), drawn(2.3))
    assert not torch.allclose(drawn(-1), drawn(0))
    assert torch.equal(drawn(1), drawn(0))


def test_initialisation() -> None:
    """Output 0, position 0, xavier for the projection, 1 and 0 for the norm."""
    torch.manual_seed(0)
    model = make_model(dataclasses.replace(GEOMETRY, width=192, class_width=300))
    state = model.state_dict()
    for name in (
        "final_layer.linear_cls.weight",
        "final_layer.linear_cls.bias",
        "cls_projectors2.bias",
        "wg_norm.bias",
    ):
        assert not state[name].any(), name
    assert (state["wg_norm.weight"] == 1).all()
    assert not state["pos_embed"][:, 0].any()
    bound = (6 / (192 + 300)) ** 0.5
    assert bound * 0.99 < state["cls_projectors2.weight"].abs().max() <= bound


def test_a_seed_gives_the_same_transformer_with_and_without_class_token() -> None:
    torch.manual_seed(0)
    state = make_model(GEOMETRY).state_dict()
    torch.manual_seed(0)
    bare = make_model(dataclasses.replace(GEOMETRY, class_width=0)).state_dict()
    assert all(torch.equal(state[name], value) for name, value in bare.items() if name != "pos_embed")


def test_losses_and_every_gradient_agree_with_float64() -> None:
    width = SMALL.targets[0][1]
    geometry = dataclasses.replace(SMALL, targets=((2, width),), class_width=width)
    changes = {"model.class_token": True, "model.align_block": (2,), "loss.projection_weight": (0.5,)}
    config = config_of("sit", **changes, **{"loss.class_weight": 0.25})
    torch.manual_seed(0)
    model = make_model(geometry)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(geometry, 4)
    class_tokens = torch.randn(4, width, generator=torch.Generator().manual_seed(5)).half()
    targets = (behind_class_token(batch.targets[0], class_tokens),)
    batch = dataclasses.replace(batch, class_tokens=class_tokens, targets=targets)
    found = losses(model, batch, SCALE, config, geometry)
    found.total(config).backward()

    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    seed, step, rows = config.seed, batch.step, batch.rows
    shape = (geometry.channels, geometry.input_size, geometry.input_size)
    mean, std = batch.moments.double().chunk(2, dim=1)
    x = (mean + std * random_keys.normal(seed, "posterior", step, rows, shape).double() - SCALE.shift) * SCALE.scale
    noise = random_keys.normal(seed, "noise", step, rows, shape).double()
    class_noise = random_keys.normal(seed, "class-noise", step, rows, (width,)).double()
    t = random_keys.uniform(seed, "time", step, rows).double()
    dropped = random_keys.uniform(seed, "label-dropout", step, rows) < config.loss.label_dropout
    labels = torch.where(dropped, geometry.n_classes, batch.labels)
    x_t = plain.interpolant(x, noise, t, "linear")
    c = class_tokens.double()
    c_t = (1 - t[:, None]) * c + t[:, None] * class_noise
    output, class_output, projections = plain.reg(weights, geometry, x_t, c_t, t, labels)
    denoising = plain.velocity_losses(output, x, noise, t, "linear")
    class_denoising = (class_output - (class_noise - c)).square().mean(1)
    aligned = plain.alignment(projections[0], targets[0].values.double())
    total = denoising.mean() + 0.25 * class_denoising.mean() + 0.5 * aligned.mean()
    total.backward()

    torch.testing.assert_close(found.denoising.double(), denoising, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.class_denoising.double(), class_denoising, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.alignments[:, 0].double(), aligned, atol=1e-5, rtol=1e-4)
    plain.assert_gradients_agree(model, weights)


@pytest.mark.parametrize(("n_rows", "deviation"), [(300, 1.0), (300, 0.04), (9, 0.04)])
def test_tokens_that_noise_drowns_are_said_before_training(n_rows: int, deviation: float) -> None:
    tokens = np.random.default_rng(0).normal(3.0, deviation, (n_rows, 12)).astype(np.float16)
    group = SimpleNamespace(path="features/x", gather=lambda rows, view, names: {"cls": tokens[rows]})
    data: Any = SimpleNamespace(class_tokens=group, valid_rows=ValidRows(n_rows, np.array([], np.int64)))
    said = class_token_line(data)
    assert said.startswith("tokens of features/x as they are, deviation ")
    found = float(said.removeprefix("tokens of features/x as they are, deviation ").split()[0])
    assert found == pytest.approx(deviation, rel=0.1 if n_rows > 9 else 0.5)
    assert ("noise of deviation 1 drowns them" in said) == (deviation < 0.25 and n_rows == 300)
