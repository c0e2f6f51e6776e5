"""RiT agrees with the public implementation: model, times, loss terms, samplers; and a whole step in float64."""

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
from tests.trainer.reference import GEOMETRIES, load_reference, reference_model, reference_state
from tests.trainer.test_transformer import randomised
from trainer.config.presets import preset
from trainer.config.sample import SampleConfig
from trainer.config.schema import LossConfig, TrainConfig
from trainer.config.tree import override
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import compare, draw, losses
from trainer.models.make import make_model
from trainer.models.reg import join, split
from trainer.objectives import rit as objective
from trainer.objectives.sampling import Drawing, calls_of, sample
from trainer.objectives.sit import shifted

GEOMETRY = GEOMETRIES["rit"]
SHIFT = math.sqrt(384 * 16 * 16 / 4096)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("rit")


def config_of(**changes: Any) -> TrainConfig:
    small = {
        "model.depth": 4, "model.width": 48, "model.heads": 4, "model.context": 5, "model.context_block": 3,
        "model.align_block": (2,),
        "precision": "fp32", "seed": 11, "loss.label_dropout": 0.5, "loss.time_shift": SHIFT,
    }  # fmt: skip
    return override(preset("rit-xl-1"), small | changes)


def test_names_and_shapes_are_the_public_checkpoints() -> None:
    expected = {name: value.shape for name, value in reference_state("rit").items()}
    assert {name: value.shape for name, value in make_model(GEOMETRY).state_dict().items()} == expected
    assert torch.equal(make_model(GEOMETRY).pos_embed, reference_state("rit")["pos_embed"])


def test_outputs(reference: dict[str, Tensor]) -> None:
    with torch.no_grad():
        output, _ = reference_model("rit")(join(reference["x"], reference["cls"]), reference["t"], reference["y"])
    image, class_token = split(output, GEOMETRY)
    torch.testing.assert_close(image, reference["x_pred"], atol=1e-5, rtol=0)
    torch.testing.assert_close(class_token, reference["cls_pred"], atol=1e-5, rtol=0)


def test_times(reference: dict[str, Tensor]) -> None:
    """Of quantiles of the normal; the published code's are also those of a cut normal, by less than our draws' grid."""
    low, high = (torch.special.ndtr(torch.logit(torch.tensor(at, dtype=torch.float64))) for at in (0.001, 0.999))
    normal = torch.special.ndtri(low + reference["time_u"].double() * (high - low))
    t = objective.draw_times(torch.zeros(7), normal, LossConfig(time_sampling="logit-normal", time_shift=SHIFT))
    torch.testing.assert_close(t.float(), reference["time_t"], atol=1e-6, rtol=0)
    ends = objective.draw_times(
        torch.zeros(2), torch.tensor([-9.0, 9.0]), LossConfig(time_sampling="logit-normal", time_shift=SHIFT)
    )
    torch.testing.assert_close(ends, torch.tensor([0.999, 0.001]))


@pytest.mark.parametrize("coupled", [False, True])
def test_every_loss_term(reference: dict[str, Tensor], coupled: bool) -> None:
    of_class = reference["loss_noise"].mean((2, 3)) if coupled else reference["loss_cls_noise"]
    x, noise = join(reference["latents"], reference["latents_cls"]), join(reference["loss_noise"], of_class)
    t = reference["loss_t"]
    loss = LossConfig(class_weight=0.2)
    x_t = objective.perturb(x, noise, t, loss)
    with torch.no_grad():
        output, _ = reference_model("rit")(x_t, t, reference["y"])
    parts = [split(of, GEOMETRY) for of in (output, x, noise, x_t)]
    of_image, of_class = (
        objective.denoising_loss(output, x, noise, x_t, t, loss).mean()
        for output, x, noise, x_t in zip(*parts, strict=True)
    )
    suffix = "_coupled" if coupled else ""
    torch.testing.assert_close(of_image, reference[f"loss_fm{suffix}"], atol=0, rtol=1e-6)
    torch.testing.assert_close(of_class, reference[f"loss_cls{suffix}"], atol=0, rtol=1e-6)
    torch.testing.assert_close(of_image + 0.2 * of_class, reference[f"loss_total{suffix}"], atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ["heun", "heun_cfg", "euler"])
def test_the_samplers(reference: dict[str, Tensor], name: str) -> None:
    """Guidance is given in data time; each slope is guided by its own time; Heun's last step is Euler's."""
    model = reference_model("rit")
    steps, scale, low, high, heun, coupled, of_class, class_low, class_high = reference[f"{name}_args"].tolist()
    config = SampleConfig(
        sampler="ode", steps=int(steps), heun=bool(heun), shift=SHIFT, guidance=scale, guidance_low=1 - high,
        guidance_high=1 - low, guidance_class=of_class, guidance_class_low=1 - class_high,
        guidance_class_high=1 - class_low,
    )  # fmt: skip
    times = 1 - shifted(torch.linspace(1, 0, int(steps) + 1, dtype=torch.float64), SHIFT)
    torch.testing.assert_close(times.float(), reference[f"{name}_times"], atol=1e-6, rtol=0)
    called: list[int] = []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        called.append(len(x))
        return model(x, t, y)[0]

    start = join(reference["xT"], reference["xT"].mean((2, 3)) if coupled else reference["clsT"])
    with torch.no_grad():
        drawn = sample(
            predict, start, reference["ys"], GEOMETRY.n_classes, config, "linear", lambda step: torch.zeros(0),
            class_width=GEOMETRY.class_width, objective=objective,
        )  # fmt: skip
    assert len(called) == (2 * steps - 1 if heun else steps)
    torch.testing.assert_close(split(drawn, GEOMETRY)[0].float(), reference[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("of_image", "of_class"), [(1.0, 3.0), (2.0, 1.0), (2.0, 3.0), (1.0, 1.0)])
def test_the_class_token_has_its_own_guidance(of_image: float, of_class: float) -> None:
    """Each part is o_∅ + s (o_y − o_∅) by its own scale, if the image is guided at all; of o_∅ = 1, o_y = 2."""
    config = SampleConfig(sampler="ode", steps=1, guidance=of_image, guidance_class=of_class)
    drawing = Drawing(
        predict=lambda x, t, y: (2.0 - y.float())[:, None].expand_as(x), labels=torch.tensor([0]), null_label=1,
        config=config, path="linear", noise=lambda step: torch.zeros(0), dtype=torch.float32, class_width=2,
        objective=objective,
    )  # fmt: skip
    output = drawing.output(torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1), 0.5)
    scale = of_class if of_image > 1 else 1.0
    assert output.tolist() == [[1 + of_image] * 3 + [1 + scale] * 2]
    calls = calls_of(config, objective, class_token=True)
    assert calls.guided == (1 if of_image > 1 else 0)


def test_a_block_for_the_context_is_asked_of_a_context_alone() -> None:
    config_of(**{"model.context": 0, "model.context_block": 5})


def test_guidance_s_interval_is_open() -> None:
    """At levels 1, 0.5 and their like: an end counts only where it is that of all levels."""
    doubled: list[bool] = []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        doubled.append(len(x) == 2)
        return torch.zeros_like(x)

    def guided(**interval: float) -> list[bool]:
        doubled.clear()
        config = SampleConfig(sampler="ode", steps=4, guidance=2.0, **interval)  # type: ignore[arg-type]
        noise = torch.ones(1, 3)
        sample(predict, noise, torch.tensor([0]), 9, config, "linear", lambda step: noise, objective=objective)
        return list(doubled)

    assert guided() == [True] * 4  # levels 1, 0.75, 0.5, 0.25
    assert guided(guidance_low=0.5) == [True, True, False, False]
    assert guided(guidance_high=0.75) == [False, False, True, True]


def test_initialisation() -> None:
    """Xavier; the patches' output is 0, the class token's is not; the context is N(0, 0.02)."""
    torch.manual_seed(0)
    geometry = dataclasses.replace(GEOMETRY, width=192, class_width=300, context=64)
    state = make_model(geometry).state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear_cls.bias", "cls_projectors.bias"):
        assert not state[name].any(), name
    assert not any(value.any() for name, value in state.items() if "adaLN_modulation" in name)
    bound = math.sqrt(6 / (192 + 300))
    for name in ("final_layer.linear_cls.weight", "cls_projectors.weight"):
        assert bound * 0.99 < state[name].abs().max() <= bound
    assert state["in_context_posemb"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.0.attn.qkv.weight"].abs().max() <= math.sqrt(6 / (4 * 192))
    assert not state["pos_embed"][:, 0].any()


def test_sizes_are_the_published_ones() -> None:
    """RiT-XL: 1152 × 28 × 16, 676 M parameters."""
    with torch.device("meta"):
        model = make_model(on_imagenet(method("rit-xl-1")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) // 1_000_000 == 676
    config = method("rit-xl-1")
    assert (config.loss.time_shift, config.sample.shift) == pytest.approx((SHIFT, SHIFT))
    assert (config.batch, config.optim.lr, config.optim.beta2, config.optim.warmup) == (1536, 3e-4, 0.95, 4170)
    assert (config.ema_decay, config.optim.clip, config.loss.class_weight) == (0.9999, 1.0, 0.2)
    assert (config.sample.steps, config.sample.heun, config.sample.guidance_low) == (25, True, 0.02)


@pytest.mark.parametrize("changes", [{}, {"class_width": 0}, {"context": 0}, {"qk_norm": False, "patch": 2}])
def test_every_parameter_matters(changes: dict[str, Any]) -> None:
    geometry = dataclasses.replace(GEOMETRY, **changes, targets=((2, 12), (4, 7)))
    model = randomised(geometry)
    x = torch.randn(2, *geometry.state_shape, generator=torch.Generator().manual_seed(1))
    output, projections = model(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 10]))
    assert output.shape == x.shape
    assert [p.shape for p in projections] == [(2, geometry.grid**2, width) for _, width in geometry.targets]
    torch.stack([of.square().sum() for of in (output, *projections)]).sum().backward()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def batch_of(n: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(
        step=5,
        rows=torch.arange(n) * 1000 + 7,
        labels=torch.arange(n) % GEOMETRY.n_classes,
        moments=torch.randn(n, 24, 4, 4, generator=generator),
        targets=(),
        stall_s=0.0,
        class_tokens=torch.randn(n, 24, generator=generator),
    )


@pytest.mark.parametrize("class_noise", ["own", "mean"])
def test_losses_and_every_gradient_agree_with_float64(class_noise: str) -> None:
    config = config_of(**{"loss.class_noise": class_noise})
    model, batch = randomised(GEOMETRY), batch_of(6)
    scale = LatentScale(scale=1.0, shift=0.0, has_posterior=False)
    of_batch = losses(model, batch, scale, config, GEOMETRY)
    of_batch.total(config).backward()

    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    seed, step, rows = config.seed, batch.step, batch.rows
    assert batch.class_tokens is not None
    x, c = batch.moments.double(), batch.class_tokens.double()
    noise = random_keys.normal(seed, "noise", step, rows, (24, 4, 4)).double()
    of_class = random_keys.normal(seed, "class-noise", step, rows, (24,)).double()
    if class_noise == "mean":
        of_class = noise.sum((2, 3)) / 16
    r = 1 / (1 + torch.exp(-random_keys.normal(seed, "time", step, rows, (1,))[:, 0].double()))
    level = (SHIFT * r / (1 + (SHIFT - 1) * r)).clamp(0.001, 0.999)
    dropped = random_keys.uniform(seed, "label-dropout", step, rows) < 0.5
    assert dropped.any()
    assert not dropped.all()
    labels = torch.where(dropped, GEOMETRY.n_classes, batch.labels)
    at = level[:, None, None, None]
    z, z_c = (1 - at) * x + at * noise, (1 - level[:, None]) * c + level[:, None] * of_class
    output, class_output = plain.rit(weights, GEOMETRY, z, z_c, 1 - level, labels)
    denoising = ((output - x) / at.clamp(min=0.05)).square().mean((1, 2, 3))
    class_denoising = ((class_output - c) / level[:, None].clamp(min=0.05)).square().mean(1)
    (denoising.mean() + 0.2 * class_denoising.mean()).backward()

    torch.testing.assert_close(of_batch.denoising.double(), denoising, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_batch.class_denoising.double(), class_denoising, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_batch.times.double(), level, atol=1e-6, rtol=0)
    plain.assert_gradients_agree(model, weights)


def test_a_step_is_one_graph() -> None:
    torch.compiler.reset()
    model, config = randomised(GEOMETRY), config_of()
    scale = LatentScale(scale=1.0, shift=0.0, has_posterior=False)

    def total(batch: Batch) -> Tensor:
        drawn = draw(batch, scale, config, GEOMETRY)
        output, projections = model(drawn.x_t, drawn.t, drawn.labels)
        return compare(output, projections, (), drawn, config, GEOMETRY)[0].mean()

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch_of(4)), total(batch_of(4)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.context_block": 5}, "--model.context-block must be a block, 1 to 4 .*, got 5"),
        (
            {"model.class_token": False, "sample.class_noise": "mean"},
            "--sample.class-noise mean are of a class token; leave them at own",
        ),
        ({"loss.direction_weight": 1.0}, "--loss.direction-weight is of a velocity, which --model.kind rit does not"),
        ({"loss.path": "cosine"}, "--model.kind rit has a linear path"),
        ({"model.head_depth": 2}, "--model.head-depth is of --model.kind ditdh; leave it at 0 with rit"),
        (
            {"sample.guidance_class_low": 0.95},
            "guidance-class-low and --sample.guidance-class-high must be an interval",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_of(**changes)
