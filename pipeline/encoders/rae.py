"""The encoder inside a diffusers AutoencoderRAE (arXiv 2510.11690), whose tokens are that autoencoder's latents.

What is stored is a features group: patch tokens after the final norm, which has no affine part there, before the
autoencoder's own statistics. So a run takes them as latents as it takes any encoder's (`--data.latents features/NAME`),
by statistics that it counts or by those of the folder (`--data.latent-statistics FOLDER`), in any codec that is exact
enough; and the same folder, which the group names as its decoder, makes pictures of them:

    x / 255 → bicubic to the encoder's size without antialias → (x − mean) / std → encoder → tokens

The encoder is one of `transformers`, an extra of its own (`pip install '.[rae]'`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.encoders.precision import arithmetic
from pipeline.encoders.registry import EncoderSpec
from pipeline.encoders.settings import read_settings
from pipeline.encoders.vae import find_directory, load_whole, weight_file
from pipeline.encoders.weights import file_sha256
from storage.base.boundary import checked
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.final_norm import PLAIN
from storage.identity import FeaturesIdentity

ENCODERS = {"dinov2": "dinov2_reg", "siglip2": "siglip2", "mae": "mae"}  # as an identity has them
SIZES = {"encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_input_size": 224, "patch_size": 16}
PIXELS = {"encoder_norm_mean": (0.485, 0.456, 0.406), "encoder_norm_std": (0.229, 0.224, 0.225)}


def describe(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """Identity of the tokens. Raises UserError, also where `--resolution` is not what the decoder makes."""
    directory = find_directory(spec.model, spec.weights, fetch=spec.fetch)
    settings = read_settings(directory)
    where, fix = f"{directory / 'config.json'}", "copy the folder again"
    kind = checked(str, settings.get("encoder_type", "dinov2"), f"{where}: encoder_type", fix)
    if kind not in ENCODERS:
        raise UserError(
            f"{directory} has an encoder {shown(kind[:60])}; encoders of an AutoencoderRAE are {', '.join(ENCODERS)}"
        )
    width, patch, size, out = (
        checked(int, settings.get(name, default), f"{where}: {name}", fix) for name, default in SIZES.items()
    )
    if min(width, patch, size, out) < 1 or size % patch:
        raise UserError(f"{where}: encoder_input_size {size} is no multiple of encoder_patch_size {patch}; {fix}")
    side = size // patch
    if resolution != side * out:
        raise UserError(
            f"{spec.store_name} decodes to {side * out} px; pass --resolution {side * out}, got {resolution}"
        )
    mean, std = (
        list(checked(tuple[float, float, float], settings.get(name) or default, f"{where}: {name}", fix))
        for name, default in PIXELS.items()
    )
    importlib.import_module("transformers")  # before anything starts
    resized = [f"bicubic {resolution}->{size} without antialias"] if size != resolution else []
    return FeaturesIdentity(
        encoder=f"diffusers.AutoencoderRAE.{ENCODERS[kind]}",
        weights_sha256=file_sha256(weight_file(directory)),
        preprocessing=", ".join(["x/255", *resized, f"mean {mean} std {std}"]),
        layer=PLAIN,
        tokens="patch",
        token_grid=(side, side),
        width=width,
    )


def load(spec: EncoderSpec, *, resolution: int, device: torch.device) -> RAEEncoder:
    """Load the encoder; `resolution` is what `describe` allowed."""
    directory = find_directory(spec.model, spec.weights)
    return RAEEncoder(directory, device, precision=spec.precision, compiled=spec.compiled)


class RAEEncoder:
    """The encoder on a device; the autoencoder's decoder is let go."""

    def __init__(
        self, directory: Path, device: torch.device, *, precision: str = "fp32", compiled: bool = False
    ) -> None:
        try:
            model = load_whole(directory)
        except UserError:
            raise
        except (OSError, AttributeError, RuntimeError, ValueError, TypeError, KeyError) as error:
            first = " ".join(str(error).split())[:160]
            raise UserError(f"{directory} cannot be loaded ({type(error).__name__}: {first}); copy it again") from error
        model.decoder = torch.nn.Identity()
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.more = (model.config.encoder_patch_size,) if model.config.encoder_type == "mae" else ()
        self.device, self.precision = device, precision
        if compiled:
            self.model.encoder.compile(dynamic=False)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`patches` float32 (B, T, D) of images uint8 (B, H, W, 3).

        Not through the autoencoder's own `encode`, which would normalise them, in the arithmetic's type.
        """
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        x = self.model._resize_and_normalize(x)
        with arithmetic(self.precision, self.device):
            tokens: Tensor = self.model._encoder_forward_fn(self.model.encoder, x, *self.more)
        return {"patches": tokens.float().contiguous()}
