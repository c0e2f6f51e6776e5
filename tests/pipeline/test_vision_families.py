"""Each family's own weight files, through the whole path a user takes, against its forward in plain torch.

Widths and depths are small; the architecture (timm's definition of it), the file's format and names, the preprocessing
and the choice of tokens are the real ones. At full size, names and shapes of every encoder meet on the meta device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pipeline.encoders import mocov3, registry, timm_vit
from pipeline.encoders.catalogue import VISION
from pipeline.encoders.weights import read_weights
from storage.base.errors import UserError
from tests.pipeline.encoding import shapes_of
from tests.pipeline.original_vits import (
    State,
    clip_forward,
    clip_shapes,
    dinov2_shapes,
    dinov3_shapes,
    forward,
    random_state,
    save_torchscript,
    siglip_shapes,
    vit_shapes,
)
from tests.slow import slow_but

CPU = torch.device("cpu")
WIDTH, DEPTH, HEADS = 48, 3, 3
REFERENCE = Path(__file__).parent.parent / "data" / "dinov2_256.npz"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def unit(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def resized(x: Tensor) -> Tensor:
    size = x.shape[-1] * 7 // 8
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False)


def as_it_is(images: np.ndarray) -> Tensor:
    return normalised(unit(images), *IMAGENET)


def then_resized(images: np.ndarray) -> Tensor:
    return resized(as_it_is(images))


def clip_sees(images: np.ndarray) -> Tensor:
    return normalised(resized(unit(images)), *OPENAI)


def siglip_sees(images: np.ndarray) -> Tensor:
    return unit(images) * 2 - 1


def mocov3_checkpoint(state: State) -> dict[str, Any]:
    """A training run's file, with the four misnamed layers of the public ViT-L."""
    names = {right: wrong for wrong, right in mocov3.MISNAMED.items()}
    run = {"module.base_encoder.head.0.weight": torch.zeros(8, WIDTH), "module.predictor.0.weight": torch.zeros(8, 8)}
    for name, value in state.items():
        wrong = next((right for right in names if name.startswith(right)), "")
        published = names[wrong] + name.removeprefix(wrong) if wrong else name
        run[f"module.base_encoder.{published}"] = value
        run[f"module.momentum_encoder.{name}"] = value + 1
    return {"epoch": 300, "arch": "vit_large", "state_dict": run, "optimizer": {"param_groups": []}}


def ijepa_checkpoint(state: State) -> dict[str, Any]:
    def parallel(part: State) -> State:
        return {f"module.{name}": value for name, value in part.items()}

    target = {name: value + 1 for name, value in state.items()}
    return {"encoder": parallel(state), "predictor": {}, "target_encoder": parallel(target), "epoch": 300}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One released file: its tensors, its format, and what the features of an image are."""

    state: State
    write: Callable[[State, Path], object]
    filename: str
    sees: Callable[[np.ndarray], Tensor]
    tokens: Callable[[State, Tensor], tuple[Tensor, Tensor]]
    depth: int = DEPTH
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def small_vit(patch: int, grid: int = 3, depth: int = DEPTH, **options: Any) -> State:
    return random_state(vit_shapes(WIDTH, depth, patch=patch, grid=grid, **options))


def plain(state: State, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return forward(state, x, HEADS, **options)


def torch_file(wrap: Callable[[State], Any] = lambda state: state) -> Callable[[State, Path], object]:
    return lambda state, path: torch.save(wrap(state), path)


DINOV2 = random_state(dinov2_shapes(WIDTH, DEPTH, grid=5))
FAMILIES = {
    "dinov2-vitb14": Family(state=DINOV2, write=torch_file(), filename="dinov2.pth", sees=then_resized, tokens=plain),
    "dinov2-vitl14-reg": Family(
        state=random_state(dinov2_shapes(WIDTH, DEPTH, grid=5, registers=4)),
        write=torch_file(),
        filename="dinov2_reg4.pth",
        sees=then_resized,
        tokens=plain,
    ),
    "dinov2-vitg14-reg": Family(
        state=random_state(dinov2_shapes(WIDTH, DEPTH, grid=5, registers=4, swiglu=True)),
        write=torch_file(),
        filename="dinov2_giant.pth",
        sees=then_resized,
        tokens=plain,
    ),
    "dinov3-vitb16": Family(
        state=random_state(dinov3_shapes(WIDTH, DEPTH, heads=HEADS)),
        write=torch_file(),
        filename="dinov3.pth",
        sees=as_it_is,
        tokens=lambda state, x: plain(state, x, eps=1e-5),
    ),
    "dinov3-vith16plus": Family(
        state=random_state(dinov3_shapes(WIDTH, DEPTH, heads=HEADS, swiglu_hidden=4 * WIDTH)),
        write=torch_file(),
        filename="dinov3_plus.pth",
        sees=as_it_is,
        tokens=lambda state, x: plain(state, x, eps=1e-5),
    ),
    "dino-vitb16": Family(state=small_vit(16), write=torch_file(), filename="dino.pth", sees=as_it_is, tokens=plain),
    "mae-vitl16": Family(
        state=small_vit(16),
        write=torch_file(
            lambda state: {"model": {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.ones(1)}}
        ),
        filename="mae.pth",
        sees=as_it_is,
        tokens=lambda state, x: plain(state, x, norm=False),
    ),
    "mocov3-vitl16": Family(
        state=small_vit(16, depth=15),
        write=torch_file(mocov3_checkpoint),
        filename="mocov3.pth.tar",
        sees=as_it_is,
        tokens=plain,
        depth=15,
    ),
    "clip-vitl14": Family(
        state=random_state(clip_shapes(WIDTH, DEPTH, patch=14, grid=3, output=16)),
        write=save_torchscript,
        filename="ViT-L-14.pt",
        sees=clip_sees,
        tokens=lambda state, x: clip_forward({n: v.half().float() for n, v in state.items()}, x, HEADS),
    ),
    "ijepa-vith14": Family(
        state=small_vit(14, cls=False),
        write=torch_file(ijepa_checkpoint),
        filename="ijepa.pth.tar",
        sees=then_resized,
        tokens=plain,
    ),
    "siglip2-vitb16": Family(
        state=random_state(siglip_shapes(WIDTH, DEPTH, grid=3)),
        write=lambda state, path: save_file(state, path),
        filename="open_clip_model.safetensors",
        sees=siglip_sees,
        tokens=lambda state, x: plain({n.removeprefix("visual.trunk."): v for n, v in state.items()}, x),
    ),
}


def small_spec(name: str, path: Path, **options: Any) -> registry.EncoderSpec:
    """The encoder `name`, but for width, depth and heads."""
    family = FAMILIES[name.partition(":")[0]]
    spec = registry.resolve_features(name, weights=path, **options)
    assert spec.vision is not None
    layer = None if spec.layer is None else min(spec.layer, family.depth)
    small = {"embed_dim": WIDTH, "depth": family.depth, "num_heads": HEADS, **family.settings}
    vision = dataclasses.replace(spec.vision, width=WIDTH, depth=family.depth, layer=layer, settings=small)
    return dataclasses.replace(spec, vision=vision, layer=layer)


@pytest.mark.parametrize("resolution", [64, 128])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_a_released_file_equal_the_familys_forward(tmp_path: Path, name: str, resolution: int) -> None:
    family = FAMILIES[name]
    family.write(family.state, tmp_path / family.filename)
    spec = small_spec(name, tmp_path / family.filename)
    images = pictures(2, resolution)
    encoder: Any = registry.load(spec, resolution=resolution, device=CPU)
    patches, cls = family.tokens(family.state, family.sees(images))
    found_patches, found_cls = encoder.encode_tokens(torch.from_numpy(images))
    assert patches.shape == (2, (resolution // 16) ** 2, WIDTH)
    scale = patches.abs().max().item()
    torch.testing.assert_close(found_patches, patches, atol=1e-5 * scale, rtol=1e-4)
    identity = registry.describe(spec, resolution=resolution)
    assert identity.token_grid == (resolution // 16, resolution // 16)
    stored = registry.encode_images(encoder, images)
    assert {key: value.shape[1:] for key, value in stored.items()} == shapes_of(identity)
    np.testing.assert_allclose(stored["patches"], patches, atol=2e-3 * scale, rtol=2e-3)
    if spec.vision and spec.vision.has_cls:
        torch.testing.assert_close(found_cls, cls, atol=1e-5 * scale, rtol=1e-4)
        np.testing.assert_allclose(stored["cls"], cls, atol=2e-3 * scale, rtol=2e-3)
    else:
        assert "cls" not in stored


LIKELY_SLIPS: dict[str, tuple[str, Callable[[np.ndarray], Tensor]]] = {
    "resize where there is none": ("dino-vitb16", lambda images: F.interpolate(then_resized(images), (64, 64))),
    "ImageNet's mean for CLIP": ("clip-vitl14", then_resized),
    "ImageNet's mean for SigLIP": ("siglip2-vitb16", as_it_is),
}


@pytest.mark.parametrize("slip", LIKELY_SLIPS)
def test_the_comparison_tells_preprocessings_apart(tmp_path: Path, slip: str) -> None:
    name, wrong = LIKELY_SLIPS[slip]
    family = FAMILIES[name]
    family.write(family.state, tmp_path / family.filename)
    encoder: Any = registry.load(small_spec(name, tmp_path / family.filename), resolution=64, device=CPU)
    images = pictures(2, 64)
    patches, _ = family.tokens(family.state, wrong(images))
    difference = (encoder.encode_tokens(torch.from_numpy(images))[0] - patches).abs().max() / patches.abs().max()
    assert difference > 3e-3  # 25 times what the test above allows


def test_layers_and_tokens_are_the_ones_named(tmp_path: Path) -> None:
    torch.save(DINOV2, tmp_path / "dinov2.pth")
    images = pictures(2, 64)
    x = then_resized(images)
    found = {}
    for options in ("", ":layer=2", ":layer=2:tokens=cls", ":layer=3:tokens=patch", ":tokens=patch"):
        spec = small_spec(f"dinov2-vitb14{options}", tmp_path / "dinov2.pth")
        identity = registry.describe(spec, resolution=64)
        arrays = registry.encode_images(registry.load(spec, resolution=64, device=CPU), images)
        assert {key: value.shape[1:] for key, value in arrays.items()} == shapes_of(identity)
        found[spec.store_name] = arrays
    assert {name: sorted(arrays) for name, arrays in found.items()} == {
        "dinov2-vitb14": ["cls", "patches"],
        "dinov2-vitb14-layer2": ["cls", "patches"],
        "dinov2-vitb14-layer2-cls": ["cls"],
        "dinov2-vitb14-layer3-patch": ["patches"],
        "dinov2-vitb14-patch": ["patches"],
    }
    for layer in (2, 3):
        patches, cls = plain(DINOV2, x, norm=False, depth=layer)
        stored = found["dinov2-vitb14-layer2" if layer == 2 else "dinov2-vitb14-layer3-patch"]
        np.testing.assert_allclose(stored["patches"], patches, atol=2e-2, rtol=2e-3)
        if layer == 2:
            np.testing.assert_allclose(stored["cls"], cls, atol=2e-2, rtol=2e-3)
            np.testing.assert_array_equal(found["dinov2-vitb14-layer2-cls"]["cls"], stored["cls"])
    np.testing.assert_array_equal(found["dinov2-vitb14-patch"]["patches"], found["dinov2-vitb14"]["patches"])


def test_clip_and_mae_can_be_asked_for_after_the_norm(tmp_path: Path) -> None:
    family = FAMILIES["clip-vitl14"]
    family.write(family.state, tmp_path / family.filename)
    spec = small_spec("clip-vitl14:layer=norm", tmp_path / family.filename)
    assert spec.store_name == "clip-vitl14-norm"
    images = pictures(2, 64)
    patches, _ = clip_forward(
        {n: v.half().float() for n, v in family.state.items()}, clip_sees(images), HEADS, norm=True
    )
    encoder: Any = registry.load(spec, resolution=64, device=CPU)
    torch.testing.assert_close(encoder.encode_tokens(torch.from_numpy(images))[0], patches, atol=1e-4, rtol=1e-4)


def test_timms_own_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    """What timm publishes for CLIP and DINOv3 has timm's names; converted from the original, it gives the same."""
    for name in ("clip-vitl14", "dinov3-vitb16", "dinov2-vitl14-reg"):
        family = FAMILIES[name]
        original, timms = tmp_path / family.filename, tmp_path / f"{name}.safetensors"
        family.write(family.state, original)
        spec = small_spec(name, original)
        assert spec.vision is not None
        model = timm_vit.build(spec.vision, 64)
        timm_vit.load_state(model, read_weights(original), original)
        save_file(model.state_dict(), timms)
        found = [
            registry.encode_images(registry.load(small_spec(name, path), resolution=64, device=CPU), pictures(1, 64))
            for path in (original, timms)
        ]
        np.testing.assert_array_equal(found[0]["patches"], found[1]["patches"])


@pytest.mark.parametrize("harm", ["missing", "left over", "another shape"])
def test_loading_is_strict(tmp_path: Path, harm: str) -> None:
    state = dict(DINOV2)
    if harm == "missing":
        del state["blocks.1.mlp.fc1.bias"]
    elif harm == "left over":
        state["blocks.7.norm1.weight"] = torch.ones(WIDTH)
    else:
        state["norm.weight"] = torch.ones(WIDTH + 1)
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match="does not hold the weights of this model"):
        registry.load(small_spec("dinov2-vitb14", tmp_path / "dinov2.pth"), resolution=64, device=CPU)


# Full size ------------------------------------------------------------------------------------------------------------


def full_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released file of a catalogued encoder, by the papers' sizes."""
    vits = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24), "h": (1280, 32, 20)}
    family, size = name.split("-")[0], name.split("-")[1].removeprefix("vit")[0]
    width, depth, heads = vits[size] if name != "siglip2-so400m16" else (1152, 27, 16)
    if family == "dinov2":
        return dinov2_shapes(width, depth, swiglu=size == "g", registers=4 * name.endswith("reg"))
    if family == "dinov3":
        return dinov3_shapes(width, depth, heads=heads, swiglu_hidden=5120 if size == "h" else 0)
    if family == "clip":
        return clip_shapes(width, depth, patch=14, grid=16, output=768)
    if family == "siglip2":
        return siglip_shapes(width, depth, grid=16, hidden=4304 if width == 1152 else None)
    if family == "ijepa":
        return vit_shapes(width, depth, patch=14, grid=16, cls=False)
    return vit_shapes(width, depth, patch=16, grid=14)


ONE_A_FAMILY = ("dinov2-vits14", "dinov3-vith16plus", "dino-vits16", "mocov3-vits16", "clip-vitl14", "siglip2-vitb16")


RELEASED = [name for name, model in VISION.items() if model.family != "tiny_vit"]


@pytest.mark.parametrize("name", slow_but(RELEASED, ONE_A_FAMILY))
def test_every_encoder_takes_the_released_names_and_shapes_at_full_size(name: str) -> None:
    """Without memory: timm's model and the released tensors meet on the meta device."""
    known = VISION[name]
    state = random_state(full_shapes(name), device="meta")
    with torch.device("meta"):
        native = {"dinov2": 592, "mocov3": 224, "dino": 224, "mae": 224}.get(name.split("-")[0], 256)
        model = timm_vit.build(known, native)
    timm_vit.load_state(model, state, Path("released"))
    block = model.blocks[0]
    assert (model.embed_dim, len(model.blocks)) == (known.width, known.depth)
    assert (getattr(model, "cls_token", None) is not None) == known.has_cls
    mlp = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
    assert mlp == pytest.approx(known.mlp * known.width**2)
    if name.startswith("mocov3"):
        assert block.attn.num_heads == {384: 12, 768: 12, 1024: 16}[known.width]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-vitl14", "mae-vitl16", "dinov3-vitl16", "siglip2-vitl16"])
def test_a_whole_large_model_at_256_and_512(tmp_path: Path, name: str) -> None:
    family = FAMILIES.get(name) or FAMILIES[{"dinov3-vitl16": "dinov3-vitb16"}.get(name, "siglip2-vitb16")]
    path = tmp_path / family.filename
    family.write(random_state(full_shapes(name), size=0.02), path)
    spec = registry.resolve_features(name, weights=path)
    for resolution, n_tokens in ((256, 256), (512, 1024)):
        encoder = registry.load(spec, resolution=resolution, device=CPU)
        arrays = registry.encode_images(encoder, pictures(1, resolution))
        assert arrays["patches"].shape == (1, n_tokens, 1024)
        assert arrays["patches"].astype(np.float32).std() > 0


# The reference vectors ------------------------------------------------------------------------------------------------


def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return dict(file)


def reference_spec(path: Path) -> tuple[registry.EncoderSpec, int]:
    width, depth, heads, registers, resolution = (int(n) for n in reference()["config"])
    assert registers == 0
    spec = registry.resolve_features("dinov2-vitb14", weights=path)
    assert spec.vision is not None
    settings = {"embed_dim": width, "depth": depth, "num_heads": heads}
    return dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, width=width, depth=depth, settings=settings)
    ), resolution


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["original", "timm"])
def test_dinov2_equals_the_public_implementation(tmp_path: Path, suffix: str, layout: str) -> None:
    vectors = reference()
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in vectors.items() if k.startswith("state/")}
    if layout == "timm":
        del state["mask_token"]  # without registers and SwiGLU the two layouts differ in this only
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    spec, resolution = reference_spec(path)
    encoder: Any = registry.load(spec, resolution=resolution, device=CPU)
    images, wanted = vectors["images_uint8_nhwc"], vectors["x_norm_patchtokens"]
    patches, cls = encoder.encode_tokens(torch.from_numpy(images))
    np.testing.assert_allclose(patches, wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(cls, vectors["x_norm_clstoken"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(registry.encode_images(encoder, images)["patches"], wanted, atol=5e-3, rtol=0)
    antialiased = F.interpolate(as_it_is(images), (224, 224), mode="bicubic", antialias=True)
    encoder.preprocess = lambda x: antialiased
    assert np.abs(encoder.encode_tokens(torch.from_numpy(images))[0].numpy() - wanted).max() > 1e-2
