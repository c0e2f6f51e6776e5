"""Encoders against independent arithmetic: DINOv2 in both weight layouts, AutoencoderKL's moments; and user errors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.encoders import dinov2, registry
from pipeline.encoders.tiny import TINY_VAE, TINY_VIT
from pipeline.encoders.vision import VisionTransformerEncoder, normalize, read_weights
from storage.errors import UserError

CPU, FP32 = torch.device("cpu"), torch.float32
REFERENCE = Path(__file__).parent.parent / "data" / "dinov2_256.npz"


def photo_like(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def write_state(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with nothing in it, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


# DINOv2 ---------------------------------------------------------------------------------------------------------------


def reference_encoder(path: Path) -> VisionTransformerEncoder:
    with np.load(REFERENCE) as reference:
        width, depth, heads, registers, resolution = (int(n) for n in reference["config"])
    assert registers == 0
    size = dinov2.input_size(resolution)
    model = VisionTransformer(
        img_size=size, patch_size=14, embed_dim=width, depth=depth, num_heads=heads, init_values=1.0, num_classes=0
    )
    dinov2.load_state(model, read_weights(path), path)
    return VisionTransformerEncoder(model, lambda x: dinov2.preprocess(x, size), CPU, FP32)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["original", "timm"])
def test_features_equal_the_public_implementation(tmp_path: Path, suffix: str, layout: str) -> None:
    with np.load(REFERENCE) as reference:
        state = {k.removeprefix("state/"): torch.from_numpy(reference[k]) for k in reference if k.startswith("state/")}
        images, patches, cls = (reference[k] for k in ("images_uint8_nhwc", "x_norm_patchtokens", "x_norm_clstoken"))
    if layout == "timm":
        del state["mask_token"]  # without registers and SwiGLU the two layouts differ in this only
    encoder = reference_encoder(write_state(state, tmp_path / f"weights{suffix}"))
    found_patches, found_cls = encoder.encode_tokens(images)
    np.testing.assert_allclose(found_patches, patches, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found_cls, cls, atol=1e-4, rtol=0)
    stored = encoder.encode(images)
    assert {name: (array.shape, array.dtype) for name, array in stored.items()} == {
        "patches": ((2, 256, 24), np.float16),
        "cls": ((2, 24), np.float16),
    }
    np.testing.assert_allclose(stored["patches"], patches, atol=5e-3, rtol=0)


def test_the_reference_tells_antialiasing_apart(tmp_path: Path) -> None:
    """The likely slip: an antialiased resize changes the features by far more than the tolerance above."""
    with np.load(REFERENCE) as reference:
        state = {k.removeprefix("state/"): torch.from_numpy(reference[k]) for k in reference if k.startswith("state/")}
        images, patches = reference["images_uint8_nhwc"], reference["x_norm_patchtokens"]
    encoder = reference_encoder(write_state(state, tmp_path / "weights.pth"))
    encoder.preprocess = lambda x: F.interpolate(normalize(x), (224, 224), mode="bicubic", antialias=True)
    assert np.abs(encoder.encode_tokens(images)[0].numpy() - patches).max() > 1e-2


def original_forward(state: dict[str, Tensor], x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """DINOv2's forward (arXiv 2304.07193, registers arXiv 2309.16588) from the original names: patch and class tokens.

    x (B, 3, H, W) on the grid that `pos_embed` has.
    """
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], dim=1) + state["pos_embed"]
    n_registers = 0
    if "register_tokens" in state:
        n_registers = state["register_tokens"].shape[1]
        registers = state["register_tokens"].expand(len(x), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
    width = tokens.shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        p = {n.removeprefix(f"blocks.{i}."): v for n, v in state.items() if n.startswith(f"blocks.{i}.")}
        y = F.layer_norm(tokens, (width,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = F.linear(y, p["attn.qkv.weight"], p["attn.qkv.bias"]).unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + p["ls1.gamma"] * F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.layer_norm(tokens, (width,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        if "mlp.w12.weight" in p:  # SwiGLU (arXiv 2002.05202, eq. 6): the gate is the first half
            gate, value = F.linear(y, p["mlp.w12.weight"], p["mlp.w12.bias"]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * value, p["mlp.w3.weight"], p["mlp.w3.bias"])
        else:
            y = F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
            y = F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
        tokens = tokens + p["ls2.gamma"] * y
    tokens = F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"], 1e-6)
    return tokens[:, 1 + n_registers :], tokens[:, 0]


def random_original_state(width: int, depth: int, n_tokens: int, *, swiglu: bool, registers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width + depth)
    hidden = 3 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + n_tokens, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for i in range(depth):
        mlp = (
            (("w12", 2 * hidden, width), ("w3", width, hidden))
            if swiglu
            else (
                ("fc1", hidden, width),
                ("fc2", width, hidden),
            )
        )
        for name, n_out, n_in in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            shapes |= {f"blocks.{i}.{name}.weight": (n_out, n_in), f"blocks.{i}.{name}.bias": (n_out,)}
        for name, n_out, n_in in mlp:
            shapes |= {f"blocks.{i}.mlp.{name}.weight": (n_out, n_in), f"blocks.{i}.mlp.{name}.bias": (n_out,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_swiglu_and_registers_are_converted(swiglu: bool, registers: int) -> None:
    width, depth, heads, side = 24, 2, 3, 56
    state = random_original_state(width, depth, (side // 14) ** 2, swiglu=swiglu, registers=registers)
    mlp: dict[str, Any] = (
        {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 6} if swiglu else {"mlp_ratio": 3}
    )
    model = VisionTransformer(
        img_size=side,
        patch_size=14,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        init_values=1.0,
        num_classes=0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        **mlp,
    )
    dinov2.load_state(model, state, Path("weights.pth"))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    patches, cls = original_forward(state, x, heads)
    with torch.inference_mode():
        tokens = model.eval().forward_features(x)
    torch.testing.assert_close(tokens[:, 1 + registers :], patches, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens[:, 0], cls, atol=1e-4, rtol=1e-4)


ORIGINAL_SHAPES = {  # width, depth, MLP tensors of a block in the original release
    "dinov2-vits14": (384, 12, {"fc1": (1536, 384), "fc2": (384, 1536)}),
    "dinov2-vitb14": (768, 12, {"fc1": (3072, 768), "fc2": (768, 3072)}),
    "dinov2-vitl14": (1024, 24, {"fc1": (4096, 1024), "fc2": (1024, 4096)}),
    "dinov2-vitg14": (1536, 40, {"w12": (8192, 1536), "w3": (1536, 4096)}),
}


def original_shapes_state(name: str, device: torch.device) -> dict[str, Tensor]:
    """Small random tensors (none on the meta device) under every name of the original release's file."""
    width, depth, mlp = ORIGINAL_SHAPES[name]
    state = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37 * 37, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        linear = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            **{f"mlp.{n}": s for n, s in mlp.items()},
        }
        for part, (n_out, n_in) in linear.items():
            state |= {f"blocks.{i}.{part}.weight": (n_out, n_in), f"blocks.{i}.{part}.bias": (n_out,)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            state[f"blocks.{i}.{part}"] = (width,)
    torch.manual_seed(0)
    return {key: torch.randn(shape, device=device) * 0.05 for key, shape in state.items()}


@pytest.mark.parametrize("name", ORIGINAL_SHAPES)
def test_every_published_size_takes_the_original_names_and_shapes(name: str) -> None:
    """Without memory: timm's model and the original release's tensors meet on the meta device."""
    spec = registry.resolve_features(name)
    with torch.device("meta"):
        model = timm.create_model(spec.model, pretrained=False, num_classes=0, img_size=518)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    converted = dinov2.original_to_timm(original_shapes_state(name, torch.device("meta")))
    assert {key: tuple(value.shape) for key, value in converted.items()} == wanted
    assert dinov2.WIDTHS[spec.model] == ORIGINAL_SHAPES[name][0]


def test_a_whole_vits14_is_the_same_from_both_layouts(tmp_path: Path) -> None:
    original = original_shapes_state("dinov2-vits14", CPU)
    timms = {key: value for key, value in original.items() if key != "mask_token"}
    images = photo_like(1, 256)
    found = []
    for path in (write_state(original, tmp_path / "a.pth"), write_state(timms, tmp_path / "b.safetensors")):
        spec = registry.resolve_features("dinov2-vits14", weights=path)
        identity = registry.describe(spec, resolution=256)
        assert identity["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(registry.load(spec, resolution=256, device=CPU, dtype=FP32).encode(images))
        shapes = registry.array_shapes(identity)
        assert {key: value.shape[1:] for key, value in found[-1].items()} == shapes
        assert shapes == {"patches": (256, 384), "cls": (384,)}
    for key in found[0]:
        np.testing.assert_array_equal(found[0][key], found[1][key])


@pytest.mark.parametrize(("resolution", "size"), [(256, 224), (512, 448)])
def test_the_model_sees_14_pixels_for_every_16(resolution: int, size: int) -> None:
    assert dinov2.input_size(resolution) == size
    assert dinov2.preprocess(torch.zeros(1, 3, resolution, resolution), size).shape == (1, 3, size, size)


def test_normalisation_comes_before_the_resize() -> None:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean[:, None, None]) / std[:, None, None]
    wanted = F.interpolate(normalised, (56, 56), mode="bicubic", align_corners=False)
    torch.testing.assert_close(dinov2.preprocess(x, 56), wanted)


# AutoencoderKL --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights in the file format of the published VAEs."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("vae") / "random-vae"
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(directory)
    return directory


def test_moments_are_the_posterior_mean_and_standard_deviation(vae_directory: Path) -> None:
    spec = registry.resolve_latents(str(vae_directory))
    identity = registry.describe(spec, resolution=64)
    weights = vae_directory / "diffusion_pytorch_model.safetensors"
    assert spec.store_name == "random-vae"
    assert identity["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (identity["latent_size"], identity["latent_scale_factor"]) == ([16, 16], 0.5)

    images = photo_like(3, 64)
    moments = registry.load(spec, resolution=64, device=CPU, dtype=FP32).encode(images)["moments"]
    assert moments.dtype == np.float16
    assert moments.shape == (3, *registry.array_shapes(identity)["moments"])

    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.inference_mode():
        parameters = AutoencoderKL.from_pretrained(vae_directory).encode(x).latent_dist.parameters
    mean, log_variance = parameters.chunk(2, dim=1)
    wanted = torch.cat([mean, (log_variance / 2).exp()], dim=1)
    np.testing.assert_allclose(moments, wanted.numpy(), atol=2e-3, rtol=2e-3)
    assert (moments[:, 4:] > 0).all()


def test_an_image_comes_out_the_same_whatever_it_is_batched_with(vae_directory: Path) -> None:
    for spec, side in (
        (registry.resolve_latents(str(vae_directory)), 64),
        (registry.resolve_features("tiny-vit"), 128),
    ):
        encoder = registry.load(spec, resolution=side, device=CPU, dtype=FP32)
        images = photo_like(4, side)
        together, alone = encoder.encode(images), encoder.encode(images[2:3])
        for name in together:
            np.testing.assert_allclose(together[name][2:3], alone[name], atol=4e-3, rtol=4e-3)


def test_decoding_gives_pictures_of_unscaled_latents(vae_directory: Path) -> None:
    vae: Any = registry.load(registry.resolve_latents(str(vae_directory)), resolution=64, device=CPU, dtype=FP32)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    images = vae.decode(latents)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.uint8)
    with torch.inference_mode():
        decoded = AutoencoderKL.from_pretrained(vae_directory).decode(torch.from_numpy(latents)).sample
    wanted = ((decoded.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - wanted).max() <= 0.51


# What the user gets wrong ---------------------------------------------------------------------------------------------


def test_names_are_resolved() -> None:
    assert registry.resolve_latents("sd-vae-ft-mse").model == "stabilityai/sd-vae-ft-mse"
    assert registry.resolve_latents("sd-vae-ft-mse").decoder == "stabilityai/sd-vae-ft-ema"
    assert registry.resolve_latents("someone/vae").store_name == "someone--vae"
    for name, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant")):
        model = registry.resolve_features(f"dinov2-vit{name}14").model
        assert model == f"vit_{size}_patch14_dinov2.lvd142m"
        assert timm.is_model(model)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="sd-vae-ft-mse, sd-vae-ft-ema, tiny-vae"):
        registry.resolve_latents("sd-vea")
    with pytest.raises(UserError, match=r"dinov2-vits14.*dinov2-vitg14.*tiny-vit"):
        registry.resolve_features("dinov2-b")


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        (registry.resolve_latents("sd-vae-ft-mse"), "hf download stabilityai/sd-vae-ft-mse.*--latents-weights"),
        (
            registry.resolve_features("dinov2-vitb14"),
            "hf download timm/vit_base_patch14_dinov2.lvd142m model.safetensors.*--features-weights",
        ),
    ],
    ids=["vae", "dinov2"],
)
def test_missing_weights_are_an_error_with_the_remedy(empty_hub: Path, spec: registry.EncoderSpec, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        registry.describe(spec, resolution=256)


def test_given_weights_that_are_absent_or_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pth of dinov2-vits14 does not exist"):
        registry.describe(registry.resolve_features("dinov2-vits14", weights=tmp_path / "gone.pth"), resolution=256)
    with pytest.raises(UserError, match=r"must hold config\.json"):
        registry.describe(registry.resolve_latents("sd-vae-ft-mse", weights=tmp_path), resolution=256)
    wrong = registry.resolve_features("dinov2-vits14", weights=TINY_VIT / "model.safetensors")
    with pytest.raises(UserError, match="does not hold the weights of this model"):
        registry.load(wrong, resolution=256, device=CPU, dtype=FP32)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"cls_token": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spec", "resolution"),
    [
        (registry.resolve_latents(str(TINY_VAE)), 100),
        (registry.resolve_features("dinov2-vits14"), 250),
        (registry.resolve_features("tiny-vit"), 256),
    ],
    ids=["vae", "dinov2", "tiny-vit"],
)
def test_a_resolution_that_does_not_fit_is_refused_before_weights_are_looked_for(
    empty_hub: Path, spec: registry.EncoderSpec, resolution: int
) -> None:
    with pytest.raises(UserError, match="--resolution"):
        registry.describe(spec, resolution=resolution)
