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
from storage.codec import INT8, Int8Codec, codec_of
from storage.errors import UserError


class Encoder(Protocol):
    """A loaded encoder."""

    def encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays (B, *row_shape) by name, of `array_dtypes`, from images uint8 (B, H, W, 3)."""
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
    codec: Int8Codec | None = None  # features: how patch tokens are quantised; None: float16


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


def resolve_features(name: str, weights: Path | None = None, dtype: str = "float16") -> EncoderSpec:
    """The vision encoder `name`, its patch tokens as float16 or int8. Raises UserError naming the known ones."""
    assert dtype in ("float16", "int8"), dtype
    weights = weights.absolute() if weights else None
    codec = INT8 if dtype == "int8" else None
    known = {"tiny-vit": ("tiny_vit", str(TINY_VIT)), **{name: ("dinov2", model) for name, model in DINOV2.items()}}
    if name in known:
        family, model = known[name]
        return EncoderSpec(kind="features", store_name=name, family=family, model=model, weights=weights, codec=codec)
    raise UserError(f"unknown vision encoder {name!r}; there are {', '.join([*DINOV2, 'tiny-vit'])}")


def describe(spec: EncoderSpec, *, resolution: int) -> dict[str, Any]:
    """The encoder's part of a group's identity. Raises UserError when its weights are missing, with the remedy."""
    identity = importlib.import_module(f"pipeline.encoders.{spec.family}").describe(spec, resolution=resolution)
    return {
        "kind": spec.kind,
        "name": spec.store_name,
        "crop": "adm-center-crop",
        "resolution": resolution,
        "dtype": "int8" if spec.codec else "float16",
        "arithmetic": "float32",
        **({"codec": spec.codec.identity} if spec.codec else {}),
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
    shapes = {"patches": (height * width, identity["width"]), "cls": (identity["width"],)}
    codec = codec_of(identity)
    return shapes if codec is None else {**shapes, "scale": (height * width, codec.n_groups(identity["width"]))}


def array_dtypes(identity: Mapping[str, Any]) -> dict[str, str]:
    """Array name → dtype. Quantised features differ in their patches only: factors and class tokens are float16."""
    return {name: identity["dtype"] if name == "patches" else "float16" for name in array_shapes(identity)}


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
