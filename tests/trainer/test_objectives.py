"""The losses agree with the public implementation; paths, velocity and score agree with calculus."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.reference import load_reference, reference_model
from trainer.alignment.cosine import alignment_loss
from trainer.config.schema import LossConfig
from trainer.objectives import lightningdit, sit
from trainer.objectives.sit import (
    Path,
    coefficients,
    interpolate,
    sample_times,
    score_from_velocity,
    shifted,
    velocity_loss,
)

PATHS: tuple[Path, ...] = ("linear", "cosine")


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_both_losses_agree_with_the_public_implementation() -> None:
    reference = load_reference("sit")
    x_t, velocity = interpolate(reference["x"], reference["loss_noise"], reference["loss_t"], "linear")
    with torch.no_grad():
        predicted, projections = reference_model("sit")(x_t, reference["loss_t"], reference["y"])
    torch.testing.assert_close(velocity_loss(predicted, velocity), reference["denoising_loss"], atol=1e-5, rtol=0)
    aligned = alignment_loss(projections[0], reference["target/0"])
    assert aligned.shape == (5,)
    torch.testing.assert_close(aligned.mean(), reference["projection_loss"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_paths_run_from_image_to_noise(path: Path) -> None:
    x, noise = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(interpolate(x, noise, torch.tensor([0.0, 1.0]).double(), path)[0][0], x[0])
    torch.testing.assert_close(interpolate(x, noise, torch.tensor([0.0, 1.0]).double(), path)[0][1], noise[1])


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_path(path: Path) -> None:
    x, noise, t = normals(6, 2, 3, 3), normals(6, 2, 3, 3, seed=1), torch.linspace(0.01, 0.99, 6).double()
    _, derivative = torch.autograd.functional.jvp(
        lambda time: interpolate(x, noise, time, path)[0], t, torch.ones_like(t)
    )
    torch.testing.assert_close(interpolate(x, noise, t, path)[1], derivative)


def test_the_cosine_path_keeps_the_variance() -> None:
    at = coefficients(torch.linspace(0, 1, 11).double(), "cosine")
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(11).double())


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(deviation=st.floats(0.1, 5.0), t=st.floats(0.02, 1.0))
def test_score_of_gaussian_data_is_exact(path: Path, deviation: float, t: float) -> None:
    # For x ~ N(0, s²): x_t ~ N(0, α²s² + σ²) and E[v | x_t] = (α'αs² + σ'σ) / (α²s² + σ²) · x_t.
    x_t, time = normals(4, 3), torch.full((4,), t, dtype=torch.float64)
    at = coefficients(time[:1], path)
    variance = at.alpha**2 * deviation**2 + at.sigma**2
    velocity = (at.d_alpha * at.alpha * deviation**2 + at.d_sigma * at.sigma) / variance * x_t
    torch.testing.assert_close(score_from_velocity(velocity, x_t, time, path), -x_t / variance, rtol=1e-8, atol=1e-10)


def test_uniform_times_are_the_draws() -> None:
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_times(uniform, torch.zeros(8), "uniform", "linear"), uniform)


@pytest.mark.parametrize("path", PATHS)
def test_logit_normal_times_give_the_public_loss_s_noise_levels(path: Path) -> None:
    normal = torch.linspace(-5.7, 5.7, 201, dtype=torch.float64)
    t = sample_times(torch.zeros(201), normal, "logit-normal", path)
    assert t.min() > 0
    assert t.max() < 1
    at = coefficients(t, path)
    torch.testing.assert_close((at.sigma / at.alpha).log(), normal)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_shifted_times_are_the_equations_on_the_noise_level(sampling: Literal["uniform", "logit-normal"]) -> None:
    """t = S_s(r) (RAE); a model of data time is trained at the same noise levels 1 − τ, as by S_1/s of τ."""
    uniform, normal = torch.rand(64, generator=torch.Generator().manual_seed(0)), normals(64, dtype=torch.float32)
    s = (768 * 16 * 16 / 4096) ** 0.5
    config = LossConfig(time_sampling=sampling, time_shift=s)
    r = uniform.double() if sampling == "uniform" else normal.double().sigmoid()
    t = sit.draw_times(uniform, normal, config)
    torch.testing.assert_close(t.double(), s * r / (1 + (s - 1) * r), atol=1e-6, rtol=0)
    assert t.median() > 0.8
    tau = lightningdit.draw_times(uniform, normal, config)
    torch.testing.assert_close(1 - tau.double(), s * (1 - r) / (1 + (s - 1) * (1 - r)), atol=1e-6, rtol=0)
    assert tau.median() < 0.2
    assert torch.equal(
        lightningdit.draw_times(uniform, normal, LossConfig(time_sampling=sampling)),
        sit.draw_times(uniform, normal, LossConfig(time_sampling=sampling)),
    )


def test_shifted_times_are_rae_s() -> None:
    """Times of the public implementation for draws u, which takes the normal's quantiles of u, and ends r at 0.999."""
    s, u = 6.92820323, torch.tensor([0.02, 0.97, 0.05995367], dtype=torch.float64)
    t = sit.draw_times(u, torch.special.ndtri(u), LossConfig(time_sampling="logit-normal", time_shift=s))
    torch.testing.assert_close(t, torch.tensor([0.47049725, 0.9784668, 0.59397864]).double(), atol=1e-5, rtol=0)
    t = sit.draw_times(0.999 * u, u, LossConfig(time_shift=s))
    torch.testing.assert_close(t, torch.tensor([0.12376598, 0.9954082, 0.30622643]).double(), atol=1e-5, rtol=0)


@settings(deadline=None)
@given(s=st.floats(0.01, 100))
def test_a_shift_is_monotone_and_keeps_both_ends(s: float) -> None:
    t = torch.linspace(0, 1, 1001)
    there = shifted(t, s)
    assert (there[0], there[-1]) == (0, 1)
    assert (there.diff() >= 0).all()
    assert ((there - t).sign() * (1 if s >= 1 else -1) >= 0).all()
    torch.testing.assert_close(shifted(there.double(), 1 / s), t.double(), atol=1e-4, rtol=0)


def test_a_shift_of_one_is_the_draw_bit_for_bit() -> None:
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(0))
    for objective in (sit, lightningdit):
        assert torch.equal(objective.draw_times(uniform, uniform, LossConfig(time_shift=1.0)), uniform)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_velocity_loss_is_a_float32_mean_per_sample(dtype: torch.dtype) -> None:
    predicted = normals(3, 4, 8, 8, dtype=torch.bfloat16)
    wanted = normals(3, 4, 8, 8, seed=1, dtype=dtype)
    loss = velocity_loss(predicted, wanted)
    assert loss.dtype == torch.float32
    expected = [(predicted[i].double() - wanted[i].double()).square().sum().item() / 256 for i in range(3)]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alignment_is_taken_in_float32(dtype: torch.dtype) -> None:
    # Values whose squares overflow float16 and whose sums lose digits in bfloat16.
    projection, target = 300 * normals(2, 5, 1024, dtype=dtype), normals(2, 5, 1024, seed=1, dtype=dtype)
    loss = alignment_loss(projection, target + projection / 300)
    assert loss.dtype == torch.float32
    a, b = projection.double(), (target + projection / 300).double()
    cosine = torch.stack([(a[i, n] @ b[i, n]) / (a[i, n].norm() * b[i, n].norm()) for i in range(2) for n in range(5)])
    torch.testing.assert_close(loss, -cosine.reshape(2, 5).mean(1).float(), atol=2e-6, rtol=0)


def test_alignment_depends_on_directions_only() -> None:
    projection, target = normals(2, 6, 16, dtype=torch.float32), normals(2, 6, 16, seed=1, dtype=torch.float32)
    factors = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(2)) * 100 + 0.01
    torch.testing.assert_close(alignment_loss(projection, target), alignment_loss(projection * factors, target * 7))
    torch.testing.assert_close(alignment_loss(target * 3, target), -torch.ones(2))
    torch.testing.assert_close(alignment_loss(-target, target), torch.ones(2))


def test_alignment_is_patch_by_patch() -> None:
    projection, target = normals(1, 6, 16, dtype=torch.float32), normals(1, 6, 16, seed=1, dtype=torch.float32)
    shuffled = alignment_loss(projection[:, [1, 0, 2, 3, 4, 5]], target)
    assert (shuffled - alignment_loss(projection, target)).abs().item() > 1e-3


def test_a_zero_token_has_no_direction_and_no_infinite_gradient() -> None:
    projection = torch.zeros(1, 2, 8, requires_grad=True)
    loss = alignment_loss(projection, torch.ones(1, 2, 8))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), projection)
    assert torch.isfinite(gradient).all()


def test_alignment_of_other_shapes_is_refused_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        alignment_loss(torch.ones(2, 4, 8), torch.ones(2, 1, 8))
