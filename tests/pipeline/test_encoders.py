"""Encoders by name: what a name may say, where weights are looked for, and what the user gets wrong."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import PrecomputeConfig
from pipeline.encoders import registry, timm_vit
from pipeline.encoders.catalogue import CLIP, HALF, IMAGENET, VAES, VISION
from pipeline.encoders.tiny import TINY_VAE, TINY_VIT
from pipeline.encoders.weights import read_weights
from pipeline.plan import plan_groups
from storage import StoreLayout, open_store
from storage.base.errors import UserError
from tests.pipeline.encoding import encode_store, read_all
from tests.pipeline.hub import empty_cache, put_in_cache
from tests.slow import slow_but

CPU = torch.device("cpu")
SMALL = "vit_tiny_patch16_224.augreg_in21k"  # 22 MB, with a classifier to leave out and mean 0.5


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group", "layer", "tokens"),
    [
        ("dinov2-vitb14", "dinov2-vitb14", None, "both"),
        ("dinov2-vitb14:layer=norm:tokens=both", "dinov2-vitb14", None, "both"),
        ("dinov2-vitb14:layer=8", "dinov2-vitb14-layer8", 8, "both"),
        ("dinov2-vitb14:tokens=patch:layer=8", "dinov2-vitb14-layer8-patch", 8, "patch"),
        ("clip-vitl14", "clip-vitl14", 24, "both"),
        ("clip-vitl14:layer=norm", "clip-vitl14-norm", None, "both"),
        ("ijepa-vith14", "ijepa-vith14", None, "patch"),
        ("timm:vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k", None, "patch"),
        (
            "timm:vit_base_patch16_224.augreg_in21k:layer=8:tokens=cls",
            "vit_base_patch16_224.augreg_in21k-layer8-cls",
            8,
            "cls",
        ),
    ],
)
def test_a_name_says_layer_and_tokens_and_so_does_its_group(name: str, group: str, layer: Any, tokens: str) -> None:
    spec = registry.resolve_features(name)
    assert (spec.store_name, spec.layer, spec.tokens) == (group, layer, tokens)
    assert re.fullmatch(r"[\w.-]+", spec.store_name)


def test_names_of_vaes_are_resolved() -> None:
    assert registry.resolve_latents("sd-vae-ft-mse").model == "stabilityai/sd-vae-ft-mse"
    assert registry.resolve_latents("sd-vae-ft-mse").decoder == "stabilityai/sd-vae-ft-ema"
    assert registry.resolve_latents("someone/vae").store_name == "someone--vae"
    assert registry.resolve_latents("someone/pipeline/vae").store_name == "someone--pipeline--vae"
    assert registry.resolve_latents("flux-vae:precision=tf32").precision == "tf32"


@pytest.mark.parametrize("name", [n for n, model in VISION.items() if model.family != "tiny_vit"])
def test_the_catalogue_agrees_with_timm(name: str) -> None:
    known = VISION[name]
    assert timm.is_model(known.model)
    cfg = timm.models.get_pretrained_cfg(known.model)
    assert known.repository == (cfg.hf_hub_id or "" if known.family == "timm_vit" else "")
    normalisation = known.preprocessing.normalisation
    assert (normalisation.mean, normalisation.std) == (cfg.mean, cfg.std) or known.family == "mocov3"
    assert normalisation in (IMAGENET, CLIP, HALF)
    assert known.n_tokens(256) == 256
    assert known.n_tokens(512) == 1024


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["dinov2-vitb14", "dinov2-vitg14", "clip-vitl14", "dino-vits16", "ijepa-vith14", "siglip2-so400m16"],
        ["dinov2-vitb14"],
    ),
)
def test_counted_operations_agree_with_torchs_counter(name: str) -> None:
    known = VISION[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm_vit.build(known, 256).eval()
        model.forward_features(torch.empty(1, 3, *model.patch_embed.img_size))
    assert known.gflop(256) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.005)


def test_the_list_names_every_encoder_and_loads_no_torch() -> None:
    code = "import sys; from pipeline.encoders import listing; print(listing.list_encoders(), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    lines = printed.splitlines()
    assert lines[-1].endswith("False")
    first_words = {line.split(" ")[0] for line in lines}
    assert {*VAES, *VISION} <= first_words
    assert max(map(len, lines)) <= 132
    (dinov2,) = (line for line in lines if line.startswith("dinov2-vitb14 "))
    for part in ("256×768", " 46 ", "final norm, cls", "ImageNet, 256→224", "timm/vit_base_patch14_dinov2"):
        assert part in dinov2


# Any vision transformer of timm ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model(SMALL, pretrained=False).state_dict()


def test_a_timm_model_is_found_in_the_hubs_cache_by_its_name(
    timm_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = empty_cache(tmp_path / "hub", monkeypatch)
    save_file(timm_state, tmp_path / "model.safetensors")
    put_in_cache(cache, f"timm/{SMALL}", tmp_path / "model.safetensors", "model.safetensors")
    spec = registry.resolve_features(f"timm:{SMALL}:layer=8:tokens=both")
    identity = registry.describe(spec, resolution=224)
    assert identity.encoder == f"timm.{SMALL}"
    assert identity.preprocessing == "x/255, mean/std 0.5"
    assert identity.layer == "block 8 of 12, no norm"
    assert identity.weights_sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    images = pictures(2, 224)
    found = registry.encode_images(registry.load(spec, resolution=224, device=CPU), images)
    model = timm.create_model(SMALL, pretrained=False).eval()
    model.load_state_dict(timm_state)
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        ((patches, prefix),) = model.forward_intermediates(
            x, indices=[7], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    np.testing.assert_allclose(found["patches"], patches, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(found["cls"], prefix[:, 0], atol=2e-3, rtol=2e-3)


def test_a_timm_model_runs_at_512(timm_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(timm_state, tmp_path / "weights.safetensors")
    spec = registry.resolve_features(f"timm:{SMALL}", weights=tmp_path / "weights.safetensors")
    patches = registry.encode_images(registry.load(spec, resolution=512, device=CPU), pictures(1, 512))["patches"]
    assert patches.shape == (1, 32 * 32, 192)


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("timm:vit_enormous_patch16", 256, "timm has no model 'vit_enormous_patch16'"),
        ("timm:resnet18", 256, "resnet18 is a ResNet, not a vision transformer"),
        (f"timm:{SMALL}:layer=13", 256, r"has blocks 1 to 12, got layer=13"),
        (f"timm:{SMALL}", 250, "--resolution must be a multiple of 16"),
        ("timm:vit_base_patch16_siglip_256.v2_webli:tokens=both", 256, "has no class token"),
        ("ijepa-vith14:tokens=cls", 256, "has no class token"),
    ],
)
def test_what_timm_cannot_give_is_said(tmp_path: Path, name: str, resolution: int, message: str) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match=message):
        registry.describe(registry.resolve_features(name, weights=tmp_path / "weights.pth"), resolution=resolution)


# Several encoders in one pass -----------------------------------------------------------------------------------------


def config(tmp_path: Path, **changes: object) -> PrecomputeConfig:
    settings = {"latents": "none", "features": "tiny-vit", "resolution": 128, "shard_rows": 4} | changes
    return PrecomputeConfig(data=str(tmp_path), store=str(tmp_path / "store"), **settings)  # type: ignore[arg-type]


LAYOUT = StoreLayout(n_rows=4, views=("original",), resolution=128, shard_rows=4)


def test_several_encoders_of_one_pass_encode_the_same_pixels(tmp_path: Path) -> None:
    settings = config(tmp_path, latents="tiny-vae", features="tiny-vit,tiny-vit:layer=2:tokens=cls")
    groups = plan_groups(settings, LAYOUT, "digest")
    paths = [group.layout.path for group in groups]
    assert paths == ["latents/tiny-vae", "features/tiny-vit", "features/tiny-vit-layer2-cls"]
    images = pictures(4, 128)
    encode_store(tmp_path / "store", groups, images)
    store = open_store(tmp_path / "store")
    for group in groups:
        encoder = registry.load(group.spec, resolution=128, device=CPU)
        parts = [registry.encode_images(encoder, part) for part in (images[:3], images[3:])]
        reader = store.group(group.layout.path)
        assert {array.name for array in group.layout.arrays} == set(parts[0])
        for name in parts[0]:
            np.testing.assert_array_equal(read_all(reader, name, 4), np.concatenate([part[name] for part in parts]))
        reader.close()


def weights_of(names: str, weights: str) -> list[str | None]:
    specs = registry.resolve_all(names, weights, "features", registry.resolve_features)
    return [spec.weights.name if spec.weights else None for spec in specs]


def test_each_encoder_gets_its_own_weights() -> None:
    assert weights_of("clip-vitl14", "/w/a.pt") == ["a.pt"]
    assert weights_of("clip-vitl14", "clip-vitl14=/w/a.pt") == ["a.pt"]
    assert weights_of("dinov2-vitb14,clip-vitl14", "clip-vitl14=/w/a.pt") == [None, "a.pt"]
    assert weights_of("dinov2-vitb14, clip-vitl14", "clip-vitl14=/w/a.pt,dinov2-vitb14=b.pth") == ["b.pth", "a.pt"]
    assert weights_of("dino-vitb16,dino-vitb16:layer=6", "/w/d.pth") == ["d.pth", "d.pth"]
    assert weights_of("timm:deit3_base_patch16_224", "timm:deit3_base_patch16_224=d.pth") == ["d.pth"]
    assert registry.resolve_all("none", "", "features", registry.resolve_features) == []


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("dinov2-vitb14,clip-vitl14", "a.pt", "--features-weights of several encoders are NAME=PATH"),
        ("dinov2-vitb14,clip-vitl14", "clip-vitl14=a,mae-vitl16=b", "'mae-vitl16=b' is no NAME=PATH of one of dinov2"),
        ("dinov2-vitb14,clip-vitl14", "clip-vitl14=a,clip-vitl14=b", "each once"),
        ("dinov2-vitb14,dinov2-vitb14:layer=norm", "", "asks for features/dinov2-vitb14 twice"),
        ("dinov2-vitb14,", "", "unknown vision encoder ''"),
    ],
)
def test_mistakes_in_a_list_are_told(names: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights_of(names, weights)


# What the user gets wrong ---------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="sd-vae-ft-mse, sd-vae-ft-ema, sdxl-vae"):
        registry.resolve_latents("sd-vea")
    with pytest.raises(UserError, match=r"dinov2-vits14.*dinov2-vitg14.*tiny-vit.*timm:NAME"):
        registry.resolve_features("dinov2-b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2-vitb14:layers=8", "options are layer=, norm=, tokens=, precision="),
        ("dinov2-vitb14:layer=8:layer=9", "each once"),
        ("dinov2-vitb14:layer=13", "a block, 1 to 12, or norm, got '13'"),
        ("dinov2-vitb14:layer=0", "1 to 12"),
        ("dinov2-vitb14:layer=-1", "1 to 12"),
        ("timm:vit_x:layer=last", "counted from 1, or norm, got 'last'"),
        ("dinov2-vitb14:tokens=all", "tokens= is one of patch, cls, both"),
        ("dinov2-vitb14:precision=int4", "precision= is one of fp32, tf32, bf16, fp16"),
        ("timm:../../etc", "unknown vision encoder"),
        ("timm:", "unknown vision encoder"),
    ],
)
def test_options_that_mean_nothing_are_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.resolve_features(name)


def test_class_tokens_alone_are_not_quantised() -> None:
    with pytest.raises(UserError, match="int8 quantises patch tokens"):
        registry.resolve_features("dinov2-vitb14:tokens=cls", dtype="int8")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "dinov2-vitb14",
            "hf download timm/vit_base_patch14_dinov2.lvd142m model.safetensors.*dinov2_vitb14_pretrain.pth.*"
            "--features-weights",
        ),
        ("clip-vitl14", r"hf download timm/vit_large_patch14_clip_224.openai model.safetensors.*ViT-L-14\.pt"),
        ("mocov3-vitb16", r"are on no hub; take facebookresearch/moco-v3: vit-b-300ep\.pth\.tar and pass"),
        ("ijepa-vith14", r"are on no hub; take facebookresearch/ijepa: IN1K-vit\.h\.14-300e\.pth\.tar"),
        (f"timm:{SMALL}", f"hf download timm/{SMALL} model.safetensors"),
    ],
)
def test_missing_weights_are_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    empty_cache(tmp_path / "hub", monkeypatch)
    with pytest.raises(UserError, match=remedy) as error:
        registry.describe(registry.resolve_features(name), resolution=256)
    assert "\n" not in str(error.value)


def test_given_weights_that_are_absent_or_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pth of dinov2-vits14 does not exist"):
        registry.describe(registry.resolve_features("dinov2-vits14", weights=tmp_path / "gone.pth"), resolution=256)
    wrong = registry.resolve_features("dinov2-vits14", weights=TINY_VIT / "model.safetensors")
    with pytest.raises(UserError, match="does not hold the weights of this model"):
        registry.load(wrong, resolution=256, device=CPU)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"cls_token": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "not a file of weights", "a list"])
def test_damaged_weight_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1000)} if damage != "a list" else [1, 2], path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not a file of weights":
        path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"weights\.pth"):
        read_weights(path)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: registry.EncoderSpec, resolution: int
) -> None:
    empty_cache(tmp_path / "hub", monkeypatch)
    with pytest.raises(UserError, match="--resolution"):
        registry.describe(spec, resolution=resolution)


def test_an_image_comes_out_the_same_whatever_it_is_batched_with() -> None:
    for spec in (registry.resolve_latents("tiny-vae"), registry.resolve_features("tiny-vit")):
        encoder = registry.load(spec, resolution=128, device=CPU)
        images = pictures(4, 128)
        together, alone = (registry.encode_images(encoder, part) for part in (images, images[2:3]))
        for name in together:
            np.testing.assert_allclose(together[name][2:3], alone[name], atol=4e-3, rtol=4e-3)
