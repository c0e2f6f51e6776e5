"""The encoders that have a name: what each computes, its exact preprocessing, and whose weights it takes.

One line an encoder, in `VAES` or `VISION`; importing this file loads no torch. `python -m pipeline encoders` prints it.

Every image is first the uint8 ADM centre crop of R pixels, x / 255. What follows is a family's own, as REPA's public
code has it where it has the family, and is part of the identity:

    DINOv2, I-JEPA      normalise, then bicubic R → 7/8 R (256 → 224, 512 → 448) without antialiasing
    CLIP                bicubic R → 7/8 R without antialiasing, then normalise with CLIP's mean and std
    DINO, DINOv3, MAE, MoCo v3, SigLIP 2      normalise; the model sees R pixels
    VAEs                x / 127.5 − 1

so that every model has R/16 × R/16 patch tokens, and VAEs of factor 8 have R/8 × R/8 latents. Learnt or stored position
embeddings are resampled to that grid once, at loading, bicubic with antialiasing (timm's resampling, as REPA calls it);
DINOv3's are rotary and need none. Features are the patch tokens after the final norm, except where REPA's code takes
the last block's output without it: MAE and CLIP (there also without the projection). Class and register tokens are no
patch tokens; the class token is stored beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.encoders.glyph import GLYPH_NAMER, GLYPH_VIT
from pipeline.encoders.tiny import RESOLUTION, TINY_VAE, TINY_VIT


class Normalisation(NamedTuple):
    """(x − mean) / std a channel, for x in [0, 1], and what the identity calls it."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation("ImageNet mean/std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalisation("CLIP mean/std", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalisation("mean/std 0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From x in [0, 1] at R pixels to what the model sees."""

    normalisation: Normalisation = IMAGENET
    patch: int = 16
    resize_first: bool = False  # before normalising; the difference is rounding, bicubic weights sum to one

    @property
    def resizes(self) -> bool:
        """Patches of 14 get 14 pixels for every 16 of the crop, which keeps R/16 tokens a side."""
        return self.patch == 14

    def input_size(self, resolution: int) -> int:
        """Pixels a side that the model sees."""
        return resolution // 16 * 14 if self.resizes else resolution

    def describe(self, resolution: int) -> str:
        """In words, as the identity has it."""
        resize = f"bicubic {resolution}->{self.input_size(resolution)} without antialias"
        steps = ["x/255", self.normalisation.name]
        if self.resizes:
            steps.insert(1 if self.resize_first else 2, resize)
        return ", ".join(steps)


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """A vision transformer. Width D, depth in blocks; `mlp` is the MLP's weights a block, in units of D²."""

    family: str = "timm_vit"  # the module below pipeline.encoders that runs it
    model: str  # timm's name of the architecture and weights, or what the family makes of it
    width: int
    depth: int
    mlp: float = 8.0
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    layer: int | None = None  # features are the output of this block, counted from 1; None: of the final norm
    has_cls: bool = True
    repository: str = ""  # on the Hugging Face hub; empty: local files only
    original: str  # whose own weight files are taken as well, and what they are called
    settings: Mapping[str, Any] = field(default_factory=dict)  # for timm's constructor
    resolution: int = 0  # the only one it knows; 0: any

    def n_tokens(self, resolution: int) -> int:
        """Patch tokens of a crop."""
        return (self.preprocessing.input_size(resolution) // self.preprocessing.patch) ** 2

    def gflop(self, resolution: int) -> float:
        """Forward pass of one image, 10⁹ operations, 2 a multiply-add; registers (at most 2 %) are left out."""
        n, d = self.n_tokens(resolution) + self.has_cls, self.width
        block = n * ((4 + self.mlp) * d**2 + 2 * n * d)
        patches = self.n_tokens(resolution) * 3 * self.preprocessing.patch**2 * d
        return 2e-9 * ((self.layer or self.depth) * block + patches)


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A diffusers autoencoder. What its latents are is read from its configuration file, not from here."""

    family: str = "vae"
    model: str  # org/name[/subfolder] on the hub, or a directory
    decoder: str = ""  # what decodes its latents, when that is another one
    factor: int = 8  # pixels a side of one latent
    channels: int
    posterior: bool = True  # false: the latent is a function of the image, and only it is stored
    gflop_256: float
    float16: bool = True  # false: activations exceed float16's range


SD_GFLOP = 273.0  # the encoder that every VAE of Stable Diffusion and Flux shares; the latent's channels hardly count

VAES = {
    "sd-vae-ft-mse": Autoencoder(
        model="stabilityai/sd-vae-ft-mse",
        decoder="stabilityai/sd-vae-ft-ema",  # the published figures decode with -ft-ema
        channels=4,
        gflop_256=SD_GFLOP,
    ),
    "sd-vae-ft-ema": Autoencoder(model="stabilityai/sd-vae-ft-ema", channels=4, gflop_256=SD_GFLOP),
    "sdxl-vae": Autoencoder(model="stabilityai/sdxl-vae", channels=4, gflop_256=SD_GFLOP, float16=False),
    "sd3-vae": Autoencoder(
        model="stabilityai/stable-diffusion-3-medium-diffusers/vae", channels=16, gflop_256=SD_GFLOP
    ),
    "flux-vae": Autoencoder(model="black-forest-labs/FLUX.1-schnell/vae", channels=16, gflop_256=SD_GFLOP),
    "dc-ae-f32c32": Autoencoder(
        model="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        factor=32,
        channels=32,
        posterior=False,
        gflop_256=324.0,
    ),
    "tiny-vae": Autoencoder(model=str(TINY_VAE), channels=4, gflop_256=3.0),
}

PATCH_14 = Preprocessing(patch=14)


def _dinov2(size: str, width: int, depth: int, registers: bool) -> VisionModel:
    model = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2.lvd142m"
    return VisionModel(
        model=model,
        width=width,
        depth=depth,
        preprocessing=PATCH_14,
        repository=f"timm/{model}",
        original=f"facebookresearch/dinov2: dinov2_vit{size[0]}14{'_reg4' if registers else ''}_pretrain.pth",
    )


def _dinov3(size: str, letter: str, width: int, depth: int, mlp: float = 8.0) -> VisionModel:
    """With timm's architecture that keeps the bias of queries and values, so that the original's is not lost."""
    model = f"vit_{size}_patch16_dinov3_qkvb.lvd1689m"
    return VisionModel(
        model=model,
        width=width,
        depth=depth,
        mlp=mlp,
        repository=f"timm/{model}",
        original=f"facebookresearch/dinov3: dinov3_vit{letter}16_pretrain_lvd1689m-….pth",
    )


def _mocov3(size: str, width: int, depth: int, heads: int, original: str) -> VisionModel:
    return VisionModel(
        family="mocov3",
        model=f"vit_{size}_patch16_224",
        width=width,
        depth=depth,
        original=original,
        settings={"num_heads": heads},
    )


def _siglip2(size: str, width: int, depth: int, mlp: float = 8.0) -> VisionModel:
    model = f"vit_{size}_patch16_siglip_256.v2_webli"
    return VisionModel(
        model=model,
        width=width,
        depth=depth,
        mlp=mlp,
        preprocessing=Preprocessing(normalisation=HALF),
        has_cls=False,
        repository=f"timm/{model}",
        original="OpenCLIP: open_clip_model.safetensors",
    )


def _glyphs(directory: Path, width: int) -> VisionModel:
    return VisionModel(
        family="tiny_vit",
        model=str(directory),
        width=width,
        depth=4,
        preprocessing=Preprocessing(normalisation=HALF),
        original="",
        resolution=64,
    )


SIZES = {"s": ("small", 384, 12), "b": ("base", 768, 12), "l": ("large", 1024, 24), "g": ("giant", 1536, 40)}
VISION = {
    **{f"dinov2-vit{letter}14": _dinov2(*size, registers=False) for letter, size in SIZES.items()},
    **{f"dinov2-vit{letter}14-reg": _dinov2(*size, registers=True) for letter, size in SIZES.items()},
    "dinov3-vits16": _dinov3("small", "s", 384, 12),
    "dinov3-vitb16": _dinov3("base", "b", 768, 12),
    "dinov3-vitl16": _dinov3("large", "l", 1024, 24),
    "dinov3-vith16plus": _dinov3("huge_plus", "h", 1280, 32, mlp=12.0),
    "dino-vits16": VisionModel(
        model="vit_small_patch16_224.dino",
        width=384,
        depth=12,
        repository="timm/vit_small_patch16_224.dino",
        original="facebookresearch/dino: dino_deitsmall16_pretrain.pth",
    ),
    "dino-vitb16": VisionModel(
        model="vit_base_patch16_224.dino",
        width=768,
        depth=12,
        repository="timm/vit_base_patch16_224.dino",
        original="facebookresearch/dino: dino_vitbase16_pretrain.pth",
    ),
    "mae-vitl16": VisionModel(
        model="vit_large_patch16_224.mae",
        width=1024,
        depth=24,
        layer=24,
        repository="timm/vit_large_patch16_224.mae",
        original="facebookresearch/mae: mae_pretrain_vit_large.pth",
    ),
    "mocov3-vits16": _mocov3("small", 384, 12, heads=12, original="facebookresearch/moco-v3: vit-s-300ep.pth.tar"),
    "mocov3-vitb16": _mocov3("base", 768, 12, heads=12, original="facebookresearch/moco-v3: vit-b-300ep.pth.tar"),
    "mocov3-vitl16": _mocov3("large", 1024, 24, heads=16, original="LTH14/rcg: its MoCo v3 ViT-L/16"),
    "clip-vitl14": VisionModel(
        model="vit_large_patch14_clip_quickgelu_224.openai",
        width=1024,
        depth=24,
        preprocessing=Preprocessing(normalisation=CLIP, patch=14, resize_first=True),
        layer=24,
        repository="timm/vit_large_patch14_clip_224.openai",
        original="openai/CLIP: ViT-L-14.pt",
    ),
    "ijepa-vith14": VisionModel(
        model="vit_huge_patch14_gap_224.in1k_ijepa",
        width=1280,
        depth=32,
        preprocessing=PATCH_14,
        has_cls=False,
        original="facebookresearch/ijepa: IN1K-vit.h.14-300e.pth.tar",
    ),
    "siglip2-vitb16": _siglip2("base", 768, 12),
    "siglip2-vitl16": _siglip2("large", 1024, 24),
    "siglip2-so400m16": _siglip2("so400m", 1152, 27, mlp=2 * 4304 / 1152),
    "tiny-vit": VisionModel(
        family="tiny_vit",
        model=str(TINY_VIT),
        width=128,
        depth=4,
        preprocessing=Preprocessing(normalisation=HALF),
        original="",
        resolution=RESOLUTION,
    ),
    "glyph-vit": _glyphs(GLYPH_VIT, width=96),
    "glyph-namer": _glyphs(GLYPH_NAMER, width=64),
}
