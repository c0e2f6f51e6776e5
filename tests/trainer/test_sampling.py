"""Samplers agree with the public implementation, with closed forms, and do not depend on what else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from storage.base.errors import UserError
from tests.trainer.reference import load_reference, reference_model
from trainer.config.sample import SampleConfig
from trainer.loop.random_keys import normal
from trainer.objectives.dit import reverse, schedule
from trainer.objectives.sampling import LAST_SDE_TIME, Predict, sample
from trainer.objectives.sit import Path, coefficients

NULL = 9


def no_noise(step: int) -> Tensor:
    raise AssertionError(f"noise asked for at step {step}")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ode", SampleConfig(sampler="ode", steps=8, guidance=1.8, guidance_low=0.0, guidance_high=0.7)),
        ("ode_nocfg", SampleConfig(sampler="ode", steps=8)),
        ("sde", SampleConfig(sampler="sde", steps=8, guidance=1.8, guidance_low=0.0, guidance_high=0.7)),
    ],
)
def test_agrees_with_the_public_implementation(name: str, config: SampleConfig) -> None:
    reference = load_reference("sit")
    assert reference["sampler_args"].tolist() == [8, 1.8, 0.0, 0.7, 0]
    model = reference_model("sit")

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y, with_projections=False)[0]

    with torch.no_grad():
        drawn = sample(
            velocity, reference["xT"], reference["y"], 1000, config, "linear", lambda step: reference["sde_noise"][step]
        )
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn, reference[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "ddpm_cfg"])
def test_ancestral_sampling_agrees_with_the_public_implementation(name: str) -> None:
    """Ten strided steps; guidance on the first three channels, as released."""
    reference = load_reference("dit")
    steps, guidance = reference["sampler_args"].tolist()
    config = SampleConfig(
        sampler="ddpm", steps=int(steps), guidance=guidance if name == "ddpm_cfg" else 1.0, guidance_channels=3
    )
    model, noise = reference_model("dit"), reference[f"{name}_noise"]
    with torch.no_grad():
        drawn = sample(
            lambda x, t, y: model(x, t, y)[0],
            reference["xT"],
            reference["y"],
            1000,
            config,
            "linear",
            noise.__getitem__,
        )
    torch.testing.assert_close(drawn, reference[name].double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("channels", [0, 1, 2])
def test_guidance_acts_on_the_first_channels_and_never_on_the_variance(channels: int) -> None:
    """Both halves of the output depend on the label; what is not guided is the conditional output's."""
    asked: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked.append(y)
        return torch.where(y == NULL, 0.1, 0.3)[:, None].expand(len(x), 4).to(x.dtype)

    def by_hand(guided: float) -> Tensor:
        return torch.tensor([guided if i < (channels or 2) else 0.3 for i in range(2)] + [0.3, 0.3]).double()

    x, labels = torch.zeros(1, 2), torch.tensor([1])
    config = SampleConfig(sampler="ddpm", steps=1, guidance=2.0, guidance_channels=channels)
    drawn = sample(predict, x, labels, NULL, config, "linear", no_noise)
    step = reverse(by_hand(0.1 + 2 * 0.2)[None], x.double(), torch.tensor([0]), schedule(1, x.device))
    torch.testing.assert_close(drawn, step.mean, atol=1e-6, rtol=1e-6)
    assert [y.tolist() for y in asked] == [[1, NULL]]


def test_ancestral_sampling_visits_strided_steps_and_ends_without_noise() -> None:
    times: list[int] = []
    asked: list[int] = []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        times.append(int(t[0]))
        return torch.zeros(len(x), 4, dtype=x.dtype)

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 2)

    sample(predict, torch.zeros(1, 2), torch.tensor([0]), NULL, SampleConfig(sampler="ddpm", steps=4), "linear", noise)
    assert times == [999, 666, 333, 0]
    assert asked == [0, 1, 2]


def test_ancestral_samples_have_the_variance_of_the_data() -> None:
    """With E[ε | x_t] of data N(0, s²) in closed form, 250 steps of the chain end at N(0, s²)."""
    count, deviation = 20_000, 0.5
    generator = torch.Generator().manual_seed(0)
    alphas_bar = schedule(1000, torch.device("cpu")).alphas_bar

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = alphas_bar[t][:, None]
        noise = (1 - at).sqrt() / (at * deviation**2 + 1 - at) * x
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    drawn = sample(
        predict,
        torch.randn(count, 1, generator=generator, dtype=torch.float64),
        torch.zeros(count, dtype=torch.long),
        NULL,
        SampleConfig(sampler="ddpm", steps=250),
        "linear",
        lambda step: torch.randn(count, 1, generator=generator, dtype=torch.float64),
    )
    assert abs(drawn.mean().item()) < 4 * deviation / math.sqrt(count)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.03)


class Recorder:
    """A velocity of zero that remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, list[int], torch.dtype]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == y.shape == (len(x),)
        assert t.dtype == x.dtype
        assert (t == t[0]).all()
        self.calls.append((t[0].item(), y.tolist(), x.dtype))
        return torch.zeros_like(x)


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_batch_is_doubled_exactly_inside_the_guidance_interval(sampler: str) -> None:
    recorder, labels = Recorder(), torch.tensor([1, 2, 3])
    config = SampleConfig(sampler=sampler, steps=20, guidance=2.0, guidance_low=0.3, guidance_high=0.7)  # type: ignore[arg-type]
    sample(recorder, torch.zeros(3, 2), labels, NULL, config, "linear", lambda step: torch.zeros(3, 2))
    assert len(recorder.calls) == 20
    inside = [0.3 <= t <= 0.7 for t, _, _ in recorder.calls]
    assert any(inside)
    assert not all(inside)
    for guided, (_, seen, _) in zip(inside, recorder.calls, strict=True):
        assert seen == ([1, 2, 3, NULL, NULL, NULL] if guided else [1, 2, 3])


def test_scale_one_never_asks_for_the_null_label() -> None:
    recorder = Recorder()
    sample(
        recorder,
        torch.zeros(2, 2),
        torch.tensor([1, 2]),
        NULL,
        SampleConfig(sampler="ode", steps=5),
        "linear",
        no_noise,
    )
    assert [labels for _, labels, _ in recorder.calls] == [[1, 2]] * 5


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == NULL, 1.0, 3.0)[:, None].expand_as(x).to(x.dtype)

    config = SampleConfig(sampler="ode", steps=4, guidance=2.5)
    drawn = sample(velocity, torch.zeros(2, 3), torch.tensor([0, 1]), NULL, config, "linear", no_noise)
    torch.testing.assert_close(drawn, torch.full((2, 3), -(1 + 2.5 * (3 - 1))).double())


def test_times_and_noise_of_the_sde() -> None:
    recorder = Recorder()
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 2)

    sample(recorder, torch.zeros(1, 2), torch.tensor([0]), NULL, SampleConfig(sampler="sde", steps=5), "linear", noise)
    times = [t for t, _, _ in recorder.calls]
    assert times == pytest.approx([1.0, 0.76, 0.52, 0.28, LAST_SDE_TIME])
    assert LAST_SDE_TIME == 0.04
    assert asked == [0, 1, 2, 3]  # the last step is deterministic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_model_sees_its_own_dtype_and_the_state_is_float64(sampler: str, dtype: torch.dtype) -> None:
    recorder = Recorder()
    config = SampleConfig(sampler=sampler, steps=3)  # type: ignore[arg-type]
    x = torch.full((1, 2), 0.1, dtype=dtype)
    drawn = sample(recorder, x, torch.tensor([0]), NULL, config, "linear", lambda step: torch.zeros(1, 2))
    assert {seen for _, _, seen in recorder.calls} == {dtype}
    assert drawn.dtype == torch.float64


def test_small_steps_of_a_half_precision_model_are_not_lost() -> None:
    # In bfloat16 a thousandth added to one would round away, and the state would never move.
    config = SampleConfig(sampler="ode", steps=1000)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    drawn = sample(lambda x, t, y: torch.ones_like(x), x, torch.tensor([0]), NULL, config, "linear", no_noise)
    torch.testing.assert_close(drawn, torch.zeros(1, 2).double(), atol=1e-12, rtol=0)


def exponential_error(steps: int, heun: bool) -> float:
    """|x(0) − e⁻¹| for v = x from x(1) = 1."""
    config = SampleConfig(sampler="ode", steps=steps, heun=heun)
    x = torch.ones(1, 1, dtype=torch.float64)
    drawn = sample(lambda x, t, y: x, x, torch.tensor([0]), NULL, config, "linear", no_noise)
    return abs(drawn.item() - math.exp(-1))


def test_euler_is_of_first_order_and_heun_closer() -> None:
    assert exponential_error(64, False) / exponential_error(128, False) == pytest.approx(2, rel=0.05)
    # The last step stays Euler's, so the error falls with the square of the step too: one local error of order two.
    assert exponential_error(64, True) / exponential_error(128, True) == pytest.approx(4, rel=0.05)
    assert exponential_error(64, True) < exponential_error(64, False) / 20


def test_heun_calls_the_model_twice_but_for_the_last_step() -> None:
    recorder = Recorder()
    config = SampleConfig(sampler="ode", steps=4, heun=True)
    sample(recorder, torch.zeros(1, 2), torch.tensor([0]), NULL, config, "linear", no_noise)
    assert [t for t, _, _ in recorder.calls] == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


def gaussian_velocity(deviation: float, path: Path) -> Predict:
    """E[v | x_t] for data N(0, s²), in closed form."""

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = coefficients(t[:, None], path)
        variance = at.alpha**2 * deviation**2 + at.sigma**2
        return (at.d_alpha * at.alpha * deviation**2 + at.d_sigma * at.sigma) / variance * x

    return velocity


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_samples_have_the_variance_of_the_data(sampler: str, path: Path) -> None:
    count, deviation = 20_000, 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    config = SampleConfig(sampler=sampler, steps=250)  # type: ignore[arg-type]
    labels = torch.zeros(count, dtype=torch.long)
    drawn = sample(
        gaussian_velocity(deviation, path),
        x,
        labels,
        NULL,
        config,
        path,
        lambda step: torch.randn(count, 1, generator=generator, dtype=torch.float64),
    )
    assert abs(drawn.mean().item()) < 4 * deviation / math.sqrt(count)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.03)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = reference_model("sit")
    config = SampleConfig(sampler="sde", steps=4, guidance=1.5)

    def draw(images: list[int]) -> Tensor:
        rows = torch.tensor(images)
        with torch.no_grad():
            return sample(
                lambda x, t, y: model(x, t, y, with_projections=False)[0],
                normal(0, "sample", 0, rows, (4, 8, 8)),
                rows % 1000,
                1000,
                config,
                "linear",
                lambda step: normal(0, "sample", 1 + step, rows, (4, 8, 8)),
            )

    together = draw([3, 0, 41, 7])
    torch.testing.assert_close(together[2:3], draw([41]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[[0, 3]], draw([3, 7]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"sampler": "sde", "steps": 1}, "at least 2"),
        ({"sampler": "ode", "steps": 0}, "at least 1"),
        ({"guidance": 0.5}, "guidance"),
        ({"guidance_low": 0.8, "guidance_high": 0.7}, "interval"),
        ({"guidance_high": 1.2}, "interval"),
        ({"guidance_low": -0.1}, "interval"),
        ({"sampler": "sde", "heun": True}, "heun"),
        ({"sampler": "ddpm", "steps": 1001}, "at most 1000"),
        ({"guidance_channels": -1}, "guidance-channels must be at least 0"),
    ],
)
def test_an_impossible_sampler_is_the_user_s_error(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        SampleConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
