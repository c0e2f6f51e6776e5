"""iREPA agrees with the public implementation: projector, normalisation, losses, initialisation; and a whole step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from storage.base.errors import UserError
from storage.torch.codecs import Tokens
from tests.trainer import plain
from tests.trainer.reference import load_reference, reference_model
from tests.trainer.test_step import SCALE, WEIGHTS, batch_of, config_of, plain_step
from tests.trainer.test_transformer import SMALL, randomised
from trainer.alignment import alignment_named, spelled_out
from trainer.alignment.irepa import GridProjector, spatially_normalised
from trainer.config.schema import LossConfig
from trainer.loop.losses import losses
from trainer.models.transformer import DiffusionTransformer
from trainer.objectives.sit import interpolate, velocity_loss

GAMMAS = ("0.6", "0.8", "1.0")


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("irepa")


def test_the_model_and_its_losses(reference: dict[str, Tensor]) -> None:
    model = reference_model("irepa")
    with torch.no_grad():
        output, (projection,) = model(reference["x"], reference["t"], reference["y"])
    torch.testing.assert_close(output, reference["v"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projection, reference["projection/0"], atol=1e-5, rtol=1e-5)
    x_t, velocity = interpolate(reference["x"], reference["loss_noise"], reference["loss_t"], "linear")
    with torch.no_grad():
        output, (projection,) = model(x_t, reference["loss_t"], reference["y"])
    denoising = velocity_loss(output, velocity)
    torch.testing.assert_close(denoising, reference["denoising_loss"], atol=1e-5, rtol=1e-5)
    for gamma in GAMMAS:
        kind = alignment_named(f"irepa:gamma={gamma}")
        target = kind.prepared(Tokens(reference["target_raw/0"]))
        wanted = F.normalize(reference[f"target_g{gamma}/0"], dim=-1)
        torch.testing.assert_close(target, wanted, atol=1e-5, rtol=1e-5)
        loss = kind.loss(projection, target).mean()
        torch.testing.assert_close(loss, reference[f"projection_loss_g{gamma}"], atol=1e-6, rtol=0)
        torch.testing.assert_close(denoising.mean() + loss, reference[f"total_loss_g{gamma}"], atol=1e-5, rtol=0)
    cosine = alignment_named("cosine")
    raw = cosine.loss(projection, cosine.prepared(Tokens(reference["target_raw/0"]))).mean()
    torch.testing.assert_close(raw, reference["projection_loss_none"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_constant_channels(reference: dict[str, Tensor], gamma: str) -> None:
    found, want = spatially_normalised(reference["edge_raw"], float(gamma)), reference[f"edge_g{gamma}"]
    assert ((found - want).abs() <= 1e-4 * want.abs().clamp(min=1)).all()


@pytest.mark.parametrize(
    ("name", "kernel", "grid"), [("conv_k1", 1, (4, 4)), ("conv_k5", 5, (4, 4)), ("conv_k3_hw", 3, (3, 5))]
)
def test_the_convolution(reference: dict[str, Tensor], name: str, kernel: int, grid: tuple[int, int]) -> None:
    projector = GridProjector(nn.Conv2d(20, 12, kernel, padding=kernel // 2), grid)
    prefix = f"{name}_state/"
    projector.load_state_dict({k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)})
    torch.testing.assert_close(projector(reference[f"{name}_in"]), reference[f"{name}_out"], atol=1e-5, rtol=1e-5)


def test_the_linear_projector(reference: dict[str, Tensor]) -> None:
    projector = alignment_named("irepa:projector_kind=linear").projector(20, 7, 12, 4)
    prefix = "linear_state/"
    projector.load_state_dict({k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)})
    torch.testing.assert_close(projector(reference["linear_in"]), reference["linear_out"], atol=1e-5, rtol=1e-5)


def test_the_convolution_keeps_torch_s_initialisation() -> None:
    """U(±1/√(D k²)) for weights and bias; the model's xavier rule is for linear layers."""
    geometry = dataclasses.replace(
        SMALL, width=48, heads=4, targets=((1, 256),), alignments=(alignment_named("irepa"),)
    )
    layer = DiffusionTransformer(geometry).projectors[0].projection_layer
    bound = (48 * 9) ** -0.5
    for values in (layer.weight, layer.bias):
        assert bound * 0.95 < values.abs().max() <= bound
        assert abs(values.std().item() / (bound / 3**0.5) - 1) < 0.1


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_a_normalised_channel_has_deviation_one_and_what_is_left_of_its_mean(seed: int, dtype: torch.dtype) -> None:
    z = (torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)
    found = spatially_normalised(z, 0.6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.std(1), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean(1), 0.4 * z.float().mean(1) / z.float().std(1), atol=1e-4, rtol=1e-4)


def test_one_token_has_no_deviation_and_a_direction() -> None:
    assert spatially_normalised(torch.randn(2, 1, 4), 0.6).isfinite().all()


def test_losses_and_every_gradient_agree_with_float64() -> None:
    """Two targets, one REPA's and one iREPA's."""
    config = config_of("sit", **{"loss.alignment": ("cosine", "irepa:gamma=0.8")})
    geometry = dataclasses.replace(SMALL, alignments=tuple(map(alignment_named, config.loss.alignment)))
    model, batch = randomised(geometry), batch_of(geometry, 4)
    found = losses(model, batch, SCALE, config, geometry)
    found.total(config).backward()
    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    denoising, alignments = plain_step(config, geometry, batch, weights)
    total = denoising.mean() + WEIGHTS[0] * alignments[:, 0].mean() + WEIGHTS[1] * alignments[:, 1].mean()
    total.backward()
    torch.testing.assert_close(found.alignments.double(), alignments, atol=1e-5, rtol=1e-4)
    plain.assert_gradients_agree(model, weights)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("irepa:kernel=2", "irepa:kernel must be odd and at least 1, got 2"),
        ("irepa:gamma=2", r"irepa:gamma must be in \[0, 1\], got 2"),
        ("irepa:gama=0.5", "irepa has no option 'gama'; its options are gamma, kernel, projector_kind"),
        ("irepa:kernel=three", "irepa:kernel must be a number of type int, got 'three'"),
        ("cosine:gamma=1", "cosine has no option 'gamma'; it has no options"),
        ("repa", "must be one of cosine, irepa, got 'repa'"),
    ],
)
def test_a_kind_spelled_wrongly_is_one_line(spelling: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(alignment=(spelling,))


def test_a_configuration_spells_every_option() -> None:
    assert LossConfig(alignment=("irepa",)).alignment == ("irepa:gamma=0.6:kernel=3:projector_kind=conv",)
    assert spelled_out("irepa:kernel=1") == spelled_out("irepa:kernel=1:gamma=0.6")
    assert LossConfig().alignment == ("cosine",)
