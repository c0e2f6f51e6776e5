"""DiT's objective agrees with the public implementation, with calculus, and with what its equations promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.reference import load_reference, reference_model
from trainer.config.schema import LossConfig
from trainer.objectives import dit as diffusion
from trainer.objectives.dit import N_STEPS, Normal, posterior, reverse, schedule, variational_loss

CPU = torch.device("cpu")
WHOLE = schedule(N_STEPS, CPU)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_agree_with_the_public_implementation() -> None:
    reference = load_reference("dit")
    x, noise, t = reference["x"], reference["noise"], reference["t"]
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    with torch.no_grad():
        output, _ = reference_model("dit")(x_t, t, reference["y"])
    torch.testing.assert_close(diffusion.mean_square_loss(output, noise), reference["mse"], atol=1e-5, rtol=0)
    torch.testing.assert_close(variational_loss(output, x, x_t, t), reference["vb"], atol=1e-5, rtol=1e-5)
    loss = diffusion.denoising_loss(output, x, noise, x_t, t, LossConfig())
    torch.testing.assert_close(loss, reference["loss"], atol=1e-5, rtol=1e-5)
    assert t.min() == 0  # so that the first step's likelihood is among them


def test_the_whole_diffusion_is_ddpm_s() -> None:
    assert WHOLE.timesteps.tolist() == list(range(1000))
    betas = WHOLE.log_betas.exp()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-9, atol=0)
    assert WHOLE.alphas_bar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)  # the noise is all that is left


@pytest.mark.parametrize("n_steps", [1, 2, 10, 250, 999, 1000])
def test_a_respaced_diffusion_has_the_whole_one_s_marginals(n_steps: int) -> None:
    some = schedule(n_steps, CPU)
    steps = some.timesteps.tolist()
    assert len(set(steps)) == n_steps
    assert (steps[0], steps[-1]) == (0, 999 if n_steps > 1 else 0)
    strides = torch.tensor(steps).diff()
    assert n_steps == 1 or strides.max() - strides.min() <= 1
    torch.testing.assert_close(some.alphas_bar, WHOLE.alphas_bar[steps], rtol=0, atol=0)
    torch.testing.assert_close((1 - some.log_betas.exp()).cumprod(0), some.alphas_bar, rtol=1e-9, atol=0)


@settings(deadline=None)
@given(n_steps=st.integers(2, 1000), data=st.data())
def test_the_posterior_is_bayes_rule(n_steps: int, data: st.DataObject) -> None:
    """q(x_{t−1} | x_t, x) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x): precisions add, and precision-weighted means."""
    some = schedule(n_steps, CPU)
    place = data.draw(st.integers(1, n_steps - 1))
    x, x_t = normals(1, 2, 2, 2), normals(1, 2, 2, 2, seed=1)
    found = posterior(x, x_t, torch.tensor([place]), some)
    beta, before = some.log_betas[place].exp(), some.alphas_bar[place - 1]
    likelihood, prior = (1 - beta) / beta, 1 / (1 - before)
    variance = 1 / (likelihood + prior)
    mean = variance * (likelihood * x_t / (1 - beta).sqrt() + prior * before.sqrt() * x)
    torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_variance, variance.log().expand(1, 1, 1, 1), rtol=1e-8, atol=1e-8)


def exact_output(noise: Tensor, interpolation: float) -> Tensor:
    return torch.cat([noise, torch.full_like(noise, interpolation)], dim=1)


def test_the_exact_noise_gives_the_posterior_s_mean_and_the_ends_its_variances() -> None:
    x, noise, t = normals(5, 3, 4, 4), normals(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 10, 500, 999])
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    true = posterior(x, x_t, t, WHOLE)
    for interpolation, ends in ((1.0, WHOLE.log_betas), (-1.0, WHOLE.log_posterior_variances)):
        model = reverse(exact_output(noise, interpolation), x_t, t, WHOLE)
        torch.testing.assert_close(model.mean, true.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.log_variance, ends[t].reshape(-1, 1, 1, 1).expand_as(x), rtol=1e-9, atol=0)


def test_the_bound_is_zero_for_the_posterior_itself_and_positive_beside_it() -> None:
    x, noise, t = normals(4, 3, 4, 4), normals(4, 3, 4, 4, seed=1), torch.tensor([1, 10, 500, 999])
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    exact = variational_loss(exact_output(noise, -1.0), x, x_t, t)
    torch.testing.assert_close(exact, torch.zeros(4), atol=1e-4, rtol=0)
    assert (variational_loss(exact_output(noise + 1, -1.0), x, x_t, t) > exact + 1e-5).all()
    # A wider variance costs least where the two ends are nearly the same, at large t.
    assert (variational_loss(exact_output(noise, 1.0), x, x_t, t)[:2] > exact[:2] + 1e-4).all()


def test_the_bound_of_another_normal_is_the_divergence_by_sampling() -> None:
    """KL(q ‖ p) = E_q[ln q − ln p], by 400,000 draws from q."""
    t = torch.tensor([3])
    x, noise = normals(1, 1, 1, 1), normals(1, 1, 1, 1, seed=1)
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    output = exact_output(noise + 0.4, 0.3)
    q, p = posterior(x, x_t, t, WHOLE), reverse(output, x_t, t, WHOLE)
    draws = q.mean + (0.5 * q.log_variance).exp() * normals(400_000, 1, 1, 1, seed=2)

    def log_density(at: Normal) -> Tensor:
        return -0.5 * ((draws - at.mean) ** 2 / at.log_variance.exp() + at.log_variance + math.log(2 * math.pi))

    expected = (log_density(q) - log_density(p)).mean().item() / math.log(2)
    assert variational_loss(output, x, x_t, t).item() == pytest.approx(expected, rel=0.02)


def test_the_first_step_s_likelihood_sums_to_one_over_pixels() -> None:
    """Over the 256 levels of a pixel, the probabilities of their bins add up to 1."""
    levels = (torch.arange(256, dtype=torch.float32) / 127.5 - 1).reshape(256, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.long)
    x_t, output = torch.full_like(levels, 0.3), exact_output(torch.full_like(levels, 0.5), 0.0)
    bits = variational_loss(output, levels, x_t, t)
    assert (2 ** -bits.double()).sum().item() == pytest.approx(1, abs=1e-4)
    assert (levels.flatten()[bits.argmin()] - reverse(output, x_t, t, WHOLE).mean[0]).abs().item() < 1 / 255


def test_the_bound_trains_the_variance_only() -> None:
    x, noise, t = (v.float() for v in (normals(3, 2, 4, 4), normals(3, 2, 4, 4, seed=1), torch.zeros(3)))
    t = torch.tensor([0, 4, 700])
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    output = normals(3, 4, 4, 4, seed=2).float().requires_grad_()
    (gradient,) = torch.autograd.grad(variational_loss(output, x, x_t, t).sum(), output)
    assert not gradient[:, :2].any()
    assert gradient[:, 2:].abs().flatten(1).sum(1).gt(0).all()
    (gradient,) = torch.autograd.grad(diffusion.mean_square_loss(output, noise).sum(), output)
    assert not gradient[:, 2:].any()


@settings(deadline=None)
@given(u=st.integers(0, 2**24 - 1))
def test_every_step_is_drawn_equally_often(u: int) -> None:
    uniform = torch.tensor([u], dtype=torch.float64).mul(2.0**-24).float()  # the grid of `random_keys.uniform`
    t = diffusion.draw_times(uniform, uniform, LossConfig())
    assert t.dtype == torch.int64
    assert t.item() == min(999, u * 1000 // 2**24) or abs(u * 1000 / 2**24 - round(u * 1000 / 2**24)) < 1e-4
    assert 0 <= t.item() < N_STEPS
    assert diffusion.unit_times(t).item() == pytest.approx(t.item() / 1000)


def test_losses_are_float32_whatever_the_model_s_dtype() -> None:
    x, noise, t = normals(2, 2, 4, 4).float(), normals(2, 2, 4, 4, seed=1).float(), torch.tensor([0, 600])
    x_t = diffusion.perturb(x, noise, t, LossConfig())
    output = normals(2, 4, 4, 4, seed=2).to(torch.bfloat16)
    loss = diffusion.denoising_loss(output, x, noise, x_t, t, LossConfig())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, diffusion.denoising_loss(output.float(), x, noise, x_t, t, LossConfig()))


def test_tables_are_made_once() -> None:
    assert schedule(N_STEPS, CPU) is WHOLE


def test_compiles_before_and_after_the_tables_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(diffusion, "_schedules", {})
    compiled = torch.compile(variational_loss, fullgraph=True, backend="eager")
    output, x, t = normals(2, 4, 4, 4), normals(2, 2, 4, 4, seed=1), torch.tensor([0, 5])
    for _ in range(2):
        torch.testing.assert_close(compiled(output, x, x, t), variational_loss(output, x, x, t))
