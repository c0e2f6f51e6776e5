"""LightningDiT agrees with the public implementation: model, loss, shifted sampler, guidance on the first channels."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.trainer.reference import GEOMETRIES, load_reference, reference_model, reference_state
from tests.trainer.test_transformer import randomised
from trainer.config.sample import SampleConfig
from trainer.config.schema import LossConfig
from trainer.models.lightningdit import EPSILON, RMSNorm, rotary_angles, rotated
from trainer.models.make import make_model
from trainer.objectives import lightningdit as objective
from trainer.objectives.sampling import sample
from trainer.objectives.sit import direction_loss, shifted, velocity_loss

GEOMETRY = GEOMETRIES["lightningdit"]
LOSS = LossConfig(time_sampling="logit-normal", direction_weight=1.0)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("lightningdit")


def test_names_and_shapes_are_the_public_checkpoints() -> None:
    expected = {name: value.shape for name, value in reference_state("lightningdit").items()}
    assert {name: value.shape for name, value in make_model(GEOMETRY).state_dict().items()} == expected


def test_output_and_every_loss_term(reference: dict[str, Tensor]) -> None:
    model = reference_model("lightningdit")
    with torch.no_grad():
        output, projections = model(reference["x"], reference["t"], reference["y"])
    assert projections == []
    torch.testing.assert_close(output, reference["v"], atol=1e-5, rtol=1e-5)
    x, noise = reference["latents_in"], reference["loss_noise"]
    t = objective.draw_times(torch.zeros(3), reference["loss_time_normal"], LOSS)
    torch.testing.assert_close(t, reference["loss_t"])
    x_t = objective.perturb(x, noise, t, LOSS)
    with torch.no_grad():
        output, _ = model(x_t, t, reference["y"])
    torch.testing.assert_close(velocity_loss(output, x - noise), reference["loss_mse"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(direction_loss(output, x - noise), reference["loss_cos"], atol=1e-5, rtol=1e-5)
    total = objective.denoising_loss(output, x, noise, x_t, t, LOSS)
    torch.testing.assert_close(total.mean(), reference["loss_total"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ode", "ode_cfg", "ode_cfg_full"])
def test_the_shifted_sampler(reference: dict[str, Tensor], name: str) -> None:
    """N points of data time are N − 1 steps; no guidance before `start` of data time is none above 1 − start of t."""
    model = reference_model("lightningdit")
    n_points, guidance, start, shift = reference[f"{name}_args"].tolist()
    times = reference[f"{name}_times"].double()
    config = SampleConfig(
        sampler="ode",
        steps=int(n_points) - 1,
        guidance=guidance,
        guidance_high=1 - max(0.0, start),
        guidance_channels=3,
        shift=1 / shift if shift else 1.0,
    )
    visited = 1 - shifted(torch.linspace(1, 0, int(n_points), dtype=torch.float64), config.shift)
    torch.testing.assert_close(visited, times, atol=1e-6, rtol=0)
    with torch.no_grad():
        drawn = sample(
            lambda x, t, y: model(x, t, y)[0], reference["xT"], reference["ys"], int(reference["null_label"]), config,
            "linear", lambda step: torch.zeros(0), objective=objective,
        )  # fmt: skip
    torch.testing.assert_close(drawn.float(), reference[name], atol=2e-5, rtol=1e-5)


def test_a_rotation_turns_pairs_and_keeps_lengths_and_relative_places() -> None:
    angles = rotary_angles(16, 4)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    turned = rotated(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])  # the first token, at row and column 0
    # The score of two tokens depends on how far apart they are: one row down and two columns to the right.
    q, k = torch.randn(16), torch.randn(16)
    q_at, k_at = (rotated(v.expand(16, 16), angles.cos(), angles.sin()) for v in (q, k))
    torch.testing.assert_close(q_at[0] @ k_at[6], q_at[5] @ k_at[11], atol=1e-5, rtol=1e-5)
    assert (q_at[0] @ k_at[6] - q_at[0] @ k_at[9]).abs() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "patch": 2}])
def test_every_parameter_matters(changes: dict[str, object]) -> None:
    geometry = dataclasses.replace(GEOMETRY, **changes, targets=((2, 12),))
    model = randomised(geometry)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    output, (projection,) = model(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 10]))
    assert output.shape == x.shape
    (output.square().sum() + projection.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_rotary_tables_are_not_saved() -> None:
    """As every model of a size has the same; public files that hold them lose them when they are imported."""
    assert not any("cos" in name or "sin" in name for name in make_model(GEOMETRY).state_dict())


@contextmanager
def strict_about_warnings() -> Iterator[None]:
    """Whatever torch warns of is an error, also what it says once a process and has said."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
def test_norms_round_nothing_before_them(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    """By the formula, in the wider of both precisions, under autocast too; torch has nothing to warn of."""
    norm = RMSNorm(16, eps=EPSILON)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
    norm = norm.to(of_weight)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(of_x)
    with strict_about_warnings(), torch.autocast("cpu", torch.bfloat16):
        normalised = norm(x)
    assert normalised.dtype == torch.promote_types(of_x, of_weight)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm.weight.double()
    bound = 4 * torch.finfo(normalised.dtype).eps
    torch.testing.assert_close(normalised.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("kind", sorted(GEOMETRIES))
def test_a_pass_in_bfloat16_warns_of_nothing(kind: str) -> None:
    geometry = dataclasses.replace(GEOMETRIES[kind], qk_norm=True)
    model, x = randomised(geometry), torch.zeros(2, *geometry.state_shape)
    with strict_about_warnings(), torch.autocast("cpu", torch.bfloat16):
        model(x, torch.tensor([0.2, 0.7]), torch.tensor([0, 1]))
