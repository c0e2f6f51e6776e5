"""The frozen encoders that other trainers run in every step: real architectures with random weights, and their FLOPs.

DINOv2 through timm as REPA calls it (normalise, then 256 → 224 bicubic, final-norm patch tokens), and the encoder of
SD-VAE through diffusers. Images are uint8 and on the device already, so that what is timed is arithmetic and no data
path: the best an online trainer can do. On a GPU both run in bf16, blocks and convolutions compiled when asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.encoders.vision import per_channel

PIXELS, DINOV2_PIXELS = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timm's name and width
ENCODERS = {
    "dinov2-vits14": ("vit_small_patch14_dinov2", 384),
    "dinov2-vitb14": ("vit_base_patch14_dinov2", 768),
    "dinov2-vitl14": ("vit_large_patch14_dinov2", 1024),
    "dinov2-vitg14": ("vit_giant_patch14_dinov2", 1536),
    "dinov2-vits14-reg": ("vit_small_patch14_reg4_dinov2", 384),  # whose tokens RiT diffuses
    "dinov2-vitb14-reg": ("vit_base_patch14_reg4_dinov2", 768),  # and RAE
}
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": PIXELS,
}


def half_on(device: torch.device) -> torch.dtype:
    """What the encoders compute in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_images(n: int, device: torch.device) -> Tensor:
    """uint8 (n, 3, 256, 256)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator).to(device)


def make_vision(name: str) -> Any:
    """A timm vision transformer without its head, frozen."""
    import timm

    model = timm.create_model(ENCODERS[name][0], pretrained=False, num_classes=0, img_size=DINOV2_PIXELS)
    return model.eval().requires_grad_(False)


def make_vae() -> Any:
    """SD-VAE, frozen; only its encoder is used."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**SD_VAE).eval().requires_grad_(False)
    del vae.decoder, vae.post_quant_conv
    return vae


def preprocess(images: Tensor) -> Tensor:
    """float32 (B, 3, 224, 224) of images uint8 (B, 3, 256, 256)."""
    x = images.float() / 255
    x = (x - per_channel(MEAN, x)) / per_channel(STD, x)
    return F.interpolate(x, (DINOV2_PIXELS, DINOV2_PIXELS), mode="bicubic", antialias=False)


@torch.no_grad()
def encode_tokens(model: Any, images: Tensor, *, class_token: bool = False) -> Tensor:
    """Patch tokens (B, T, D) in the model's dtype, behind the class token if asked for.

    With no_grad, since inference tensors could not be trained against.
    """
    x = preprocess(images).to(model.patch_embed.proj.weight.dtype)
    tokens = model.forward_features(x)
    patches = tokens[:, model.num_prefix_tokens :]
    return torch.cat([tokens[:, :1], patches], dim=1) if class_token else patches


@torch.no_grad()
def encode_moments(vae: Any, images: Tensor) -> Tensor:
    """Moments float16 (B, 8, 32, 32)."""
    x = (images.float() / 127.5 - 1).to(vae.dtype).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).half().contiguous()


class Encoders:
    """What is in the loop: a vision encoder, and a VAE if asked for. In host memory until `to` says otherwise."""

    def __init__(self, name: str, *, with_vae: bool, compiled: bool, device: torch.device) -> None:
        self.vision = make_vision(name).to(half_on(device))
        self.vae = make_vae().to(half_on(device), memory_format=torch.channels_last) if with_vae else None
        if compiled:
            for block in self.vision.blocks:
                block.compile()
            if self.vae is not None:
                self.vae.encoder.compile()

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.vision.to(device)
        if self.vae is not None:
            self.vae.to(device)


def vision_flops(name: str) -> int:
    """FLOPs of the vision encoder on one image; counted without computing anything."""
    with torch.device("meta"):
        model, x = make_vision(name), torch.empty(1, 3, DINOV2_PIXELS, DINOV2_PIXELS)
        return _flops(model.forward_features, x)


def vae_flops() -> int:
    """FLOPs of SD-VAE's encoder on one image."""
    with torch.device("meta"):
        return _flops(make_vae().encode, torch.empty(1, 3, PIXELS, PIXELS))


def _flops(function: Any, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops()
