"""SiT and DiT agree with the public implementations, and with their own FLOP count; what their parts promise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import on_imagenet
from storage.base.errors import UserError
from tests.slow import slow_but
from tests.trainer.reference import GEOMETRIES, load_reference, reference_model, reference_state
from trainer.config.presets import PRESETS
from trainer.config.schema import Kind
from trainer.config.tree import override
from trainer.models.blocks import sincos_position_embedding, unpatchify
from trainer.models.flops import forward_flops_per_image
from trainer.models.make import make_model
from trainer.models.transformer import DiffusionTransformer, Geometry

KINDS: tuple[Kind, ...] = ("sit", "dit")
SMALL = Geometry(
    kind="sit",
    input_size=8,
    channels=3,
    patch=2,
    width=32,
    depth=3,
    heads=4,
    n_classes=7,
    targets=((1, 12), (3, 20)),
    projector_width=24,
)


def randomised(config: Geometry, seed: int = 0) -> DiffusionTransformer:
    """A model whose gates and output layer are not zero, so that every parameter matters."""
    torch.manual_seed(seed)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(config: Geometry, batch: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.channels, config.input_size, config.input_size, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.randint(0, config.n_classes + 1, (batch,), generator=generator)


def test_forward_and_projections_agree_with_the_public_implementation() -> None:
    reference = load_reference("sit")
    with torch.no_grad():
        velocity, projections = reference_model("sit")(reference["x"], reference["t"], reference["y"])
    assert len(projections) == 1
    torch.testing.assert_close(velocity, reference["v"], atol=1e-5, rtol=0)
    torch.testing.assert_close(projections[0], reference["projection/0"], atol=1e-5, rtol=0)


def test_noise_and_variance_agree_with_the_public_implementation() -> None:
    reference = load_reference("dit")
    with torch.no_grad():
        output, projections = reference_model("dit")(reference["x"], reference["t"], reference["y"])
    assert projections == []
    torch.testing.assert_close(output, reference["model_out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_the_public_checkpoints(kind: Kind) -> None:
    geometry = GEOMETRIES[kind]
    expected = {name: value.shape for name, value in reference_state(kind).items()}
    assert {name: value.shape for name, value in DiffusionTransformer(geometry).state_dict().items()} == expected
    with_norm = DiffusionTransformer(dataclasses.replace(geometry, qk_norm=True)).state_dict()
    extra = {f"blocks.{i}.attn.{n}_norm.{p}" for i in range(geometry.depth) for n in "qk" for p in ("weight", "bias")}
    assert with_norm.keys() - expected.keys() == extra


def test_kinds_differ_by_the_last_layer_only() -> None:
    sit, dit = (DiffusionTransformer(dataclasses.replace(SMALL, kind=kind)).state_dict() for kind in KINDS)
    assert sit.keys() == dit.keys()
    other = {name for name in sit if sit[name].shape != dit[name].shape}
    assert other == {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_position_embedding_is_computed_as_the_checkpoints_hold_it(kind: Kind) -> None:
    model = DiffusionTransformer(GEOMETRIES[kind])
    assert torch.equal(model.pos_embed, reference_state(kind)["pos_embed"])
    assert not model.pos_embed.requires_grad


def test_position_embedding_puts_the_column_first() -> None:
    embedding = sincos_position_embedding(16, 5).reshape(5, 5, 16)
    assert torch.equal(embedding[0, :, :8], embedding[4, :, :8])  # the same column in any row
    assert torch.equal(embedding[:, 0, 8:], embedding[:, 4, 8:])
    assert len(torch.unique(embedding.reshape(25, 16), dim=0)) == 25


def test_unpatchify_puts_each_token_in_its_place() -> None:
    batch, grid, patch, channels = 2, 3, 2, 4
    tokens = torch.randn(batch, grid * grid, patch * patch * channels)
    image = unpatchify(tokens, patch, grid, channels)
    for token in range(grid * grid):
        top, left = patch * (token // grid), patch * (token % grid)
        pixels = image[:, :, top : top + patch, left : left + patch].permute(0, 2, 3, 1)
        assert torch.equal(pixels.reshape(batch, -1), tokens[:, token])


def test_adaln_zero_initialisation() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, width=128, n_classes=500)
    model: Any = DiffusionTransformer(config)
    x, t, y = inputs(config, 3)
    velocity, projections = model(x, t, y)
    assert torch.count_nonzero(velocity) == 0
    embedded = model.x_embedder(x) + model.pos_embed
    for projector, projection in zip(model.projectors.children(), projections, strict=True):
        torch.testing.assert_close(projection, projector(embedded), atol=0, rtol=0)  # each block is the identity
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    fan_in, fan_out = config.channels * config.patch**2, config.width
    bound = math.sqrt(6 / (fan_in + fan_out))
    patches = model.x_embedder.proj.weight
    assert 0.98 * bound < patches.abs().max().item() <= bound
    hidden = model.projectors.get_parameter("0.0.weight")
    bound = math.sqrt(6 / (config.width + config.projector_width))
    assert 0.98 * bound < hidden.abs().max().item() <= bound
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("targets", [(), ((2, 12),), ((1, 12), (3, 20), (3, 5))])
def test_a_seed_gives_the_same_transformer_with_and_without_alignment(targets: tuple[tuple[int, int], ...]) -> None:
    """So that paired runs differ by their loss alone; and a target's projector does not depend on those after it."""
    torch.manual_seed(3)
    want = DiffusionTransformer(SMALL).state_dict()
    torch.manual_seed(3)
    found = DiffusionTransformer(dataclasses.replace(SMALL, targets=targets)).state_dict()
    shared = [name for name in found if not name.startswith("projectors.")]
    assert shared == [name for name in want if not name.startswith("projectors.")]
    for name in shared + [name for name in found if targets[:1] == SMALL.targets[:1] and "projectors.0." in name]:
        assert torch.equal(found[name], want[name]), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_sample_does_not_depend_on_its_batch(qk_norm: bool) -> None:
    model = randomised(dataclasses.replace(SMALL, qk_norm=qk_norm))
    x, t, y = inputs(SMALL, 4)
    with torch.no_grad():
        velocity, projections = model(x, t, y)
        alone, alone_projections = model(x[2:3], t[2:3], y[2:3])
    torch.testing.assert_close(velocity[2:3], alone, atol=1e-5, rtol=1e-5)
    for together, single in zip(projections, alone_projections, strict=True):
        torch.testing.assert_close(together[2:3], single, atol=1e-5, rtol=1e-5)


def test_projections_are_optional_and_do_not_touch_the_velocity() -> None:
    model = randomised(SMALL)
    batch = inputs(SMALL, 2)
    with torch.no_grad():
        velocity, projections = model.train()(*batch)
        without, none = model.eval()(*batch, with_projections=False)
    assert torch.equal(velocity, without)
    assert none == []
    assert [tuple(p.shape) for p in projections] == [(2, 16, 12), (2, 16, 20)]


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries() -> None:
    for qk_norm in (False, True):
        model = randomised(dataclasses.replace(SMALL, qk_norm=qk_norm))
        attention: Any = model.blocks[0].attn
        tokens = torch.randn(2, 16, SMALL.width, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            before = attention(tokens)
            attention.qkv.weight[: SMALL.width] *= 30
            attention.qkv.bias[: SMALL.width] *= 30
            moved = (attention(tokens) - before).abs().max().item()
        assert (moved < 1e-3) == qk_norm, (qk_norm, moved)


def test_the_model_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    model = randomised(SMALL)
    batch = inputs(SMALL, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        (velocity, projections), (expected, expected_projections) = compiled(*batch), model(*batch)
    torch.testing.assert_close(velocity, expected)
    torch.testing.assert_close(projections, expected_projections)


def test_a_double_model_gives_double_gradients() -> None:
    model = randomised(SMALL).double()
    x, t, y = inputs(SMALL, 2)
    velocity, _ = model(x.double(), t.double(), y)
    assert velocity.dtype == torch.float64
    velocity.square().mean().backward()
    gradient = model.x_embedder.proj.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float64


# ---- cost -------------------------------------------------------------------------------------------------------


def meta_flops(config: Geometry, backward: bool, with_projections: bool = True) -> int:
    with torch.device("meta"):
        model = make_model(config)
        x = torch.empty(1, *config.state_shape)
        t, y = torch.empty(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        velocity, projections = model(x, t, y, with_projections)
        if backward:
            torch.stack([velocity.sum(), *[p.sum() for p in projections]]).sum().backward()
    return counter.get_total_flops()


def imagenet_config(name: str, *, aligned: bool = True, target_width: int = 768, **changes: Any) -> Geometry:
    """A preset's model on ImageNet: SD-VAE's latents, or where the patch is 1 those of an f16d32 autoencoder."""
    geometry = on_imagenet(override(PRESETS[name](), changes), target_width)
    return geometry if aligned else dataclasses.replace(geometry, targets=(), alignments=())


@pytest.mark.parametrize(
    "config",
    [
        imagenet_config("sit-s-4"),
        pytest.param(imagenet_config("sit-b-8"), marks=pytest.mark.slow),
        pytest.param(imagenet_config("dit-s-4"), marks=pytest.mark.slow),
        dataclasses.replace(SMALL, qk_norm=True),
        dataclasses.replace(SMALL, kind="dit"),
        GEOMETRIES["reg"],
        GEOMETRIES["irepa"],
        GEOMETRIES["lightningdit"],
        dataclasses.replace(GEOMETRIES["rit"], targets=((2, 40),)),
        GEOMETRIES["ditdh"],
    ],
    ids="sit-s-4,sit-b-8,dit-s-4,two targets,dit; two targets,reg,irepa,lightningdit,rit,ditdh".split(","),
)
def test_flop_count_equals_torch_s_count(config: Geometry) -> None:
    assert forward_flops_per_image(config) == meta_flops(config, backward=False)
    without = forward_flops_per_image(config, with_projections=False)
    assert without == meta_flops(config, backward=False, with_projections=False)


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_sizes_are_the_published_ones(size: str, millions: int) -> None:
    """DiT (arXiv 2212.09748, table 4): parameters of DiT-S/2 to DiT-XL/2; at 512 px more tokens, not more weights."""
    for name in (f"dit-{size}-2", f"dit-{size}-2-512"):
        geometry = imagenet_config(name, aligned=False)
        with torch.device("meta"):
            model = DiffusionTransformer(geometry)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert round(trained / 1e6) == millions
        assert model.pos_embed.shape[1] == (1024 if "512" in name else 256)


@pytest.mark.parametrize(
    ("name", "gflop"), slow_but([("sit-b-2", 149), ("sit-l-2", 496), ("sit-xl-2", 724)], ["sit-b-2"])
)
def test_flops_of_a_training_step_at_published_sizes(name: str, gflop: int) -> None:
    config = imagenet_config(name)
    assert round(3 * forward_flops_per_image(config) / 1e9) == gflop
    # The first layer's input needs no gradient, so torch counts a trace less than three forwards.
    assert meta_flops(config, backward=True) == pytest.approx(3 * forward_flops_per_image(config), rel=1e-3)


# ---- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [({"patch": 3}, "patch"), ({"heads": 5}, "heads"), ({"width": 34, "heads": 2}, "width")]
    + [({"targets": ((block, 8),)}, "block") for block in (0, 4, -1)],
)
def test_an_impossible_geometry_is_the_user_s_error(change: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError):
        DiffusionTransformer(SMALL)(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
