"""Every encoder by name, what it writes, and how it is loaded. Importing this file imports no encoder library.

A family is a module with two functions of the same signature as its siblings':

    describe(spec, resolution) -> dict      the identity: everything that determines the numbers, weights' SHA-256 too
    load(spec, resolution, device, dtype) -> Encoder

`describe` builds no model on a device, but finds the weights and hashes them, so that missing weights end a run before
it starts.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.encoders.tiny import TINY_VAE, TINY_VIT
from storage.errors import UserError


class Encoder(Protocol):
    """A loaded encoder."""

    def encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays float16 (B, *row_shape) by name, from images uint8 (B, H, W, 3)."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder as asked for. `weights` overrides where its weights are looked for."""

    kind: str  # "latents" or "features"
    store_name: str  # its group's name in a store
    family: str  # the module below pipeline.encoders that runs it
    model: str  # what that module loads: a hub id, a directory, a timm name
    weights: Path | None = None
    decoder: str = ""  # latents: the VAE to decode with, a hub id or directory


VAES = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "tiny-vae": str(TINY_VAE),
}
DECODERS = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-ema"}  # the published figures decode with -ft-ema
DINOV2 = {
    "dinov2-vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vitg14": "vit_giant_patch14_dinov2.lvd142m",
}


def resolve_latents(name: str, weights: Path | None = None) -> EncoderSpec:
    """The VAE `name`: a known name, a diffusers directory, or a hub id. Raises UserError for anything else."""
    if name in VAES:
        return EncoderSpec(
            kind="latents",
            store_name=name,
            family="vae",
            model=VAES[name],
            weights=weights.absolute() if weights else None,
            decoder=DECODERS.get(name, str(weights.absolute()) if weights else VAES[name]),
        )
    directory = Path(name)
    if directory.is_dir():
        model = str(directory.absolute())
        return EncoderSpec(kind="latents", store_name=directory.name, family="vae", model=model, decoder=model)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return EncoderSpec(
            kind="latents", store_name=name.replace("/", "--"), family="vae", model=name, weights=weights, decoder=name
        )
    raise UserError(
        f"unknown VAE {name!r}; name one of {', '.join(VAES)}, an existing diffusers directory, or a hub id (org/name)"
    )


def resolve_features(name: str, weights: Path | None = None) -> EncoderSpec:
    """The vision encoder `name`. Raises UserError naming the known ones."""
    weights = weights.absolute() if weights else None
    if name == "tiny-vit":
        return EncoderSpec(kind="features", store_name=name, family="tiny_vit", model=str(TINY_VIT), weights=weights)
    if name in DINOV2:
        return EncoderSpec(kind="features", store_name=name, family="dinov2", model=DINOV2[name], weights=weights)
    raise UserError(f"unknown vision encoder {name!r}; there are {', '.join([*DINOV2, 'tiny-vit'])}")


def describe(spec: EncoderSpec, *, resolution: int) -> dict[str, Any]:
    """The encoder's part of a group's identity. Raises UserError when its weights are missing, with the remedy."""
    identity = importlib.import_module(f"pipeline.encoders.{spec.family}").describe(spec, resolution=resolution)
    return {
        "kind": spec.kind,
        "name": spec.store_name,
        "crop": "adm-center-crop",
        "resolution": resolution,
        "dtype": "float16",
        "arithmetic": "float32",
        **identity,
    }


def load(spec: EncoderSpec, *, resolution: int, device: Any, dtype: Any) -> Encoder:
    """Load the encoder onto a torch device, with weights and arithmetic of a torch dtype."""
    module = importlib.import_module(f"pipeline.encoders.{spec.family}")
    return module.load(spec, resolution=resolution, device=device, dtype=dtype)


def provenance(spec: EncoderSpec) -> dict[str, str]:
    """What is recorded beside the identity: where the weights were asked for and what decodes the latents."""
    where = str(spec.weights) if spec.weights else spec.model
    return {"weights": where, **({"decoder": spec.decoder} if spec.decoder else {})}


def array_shapes(identity: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Array name → shape of one sample of one view, by the identity's geometry."""
    if identity["kind"] == "latents":
        return {"moments": (2 * identity["latent_channels"], *identity["latent_size"])}
    height, width = identity["token_grid"]
    return {"patches": (height * width, identity["width"]), "cls": (identity["width"],)}


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
