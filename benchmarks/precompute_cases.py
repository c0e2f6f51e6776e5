"""What `precompute.py` precomputes: images, encoders and their weights, made where they are missing."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cluster.resources import cores
from pipeline.config import PrecomputeConfig
from pipeline.encode import Array, UnitEncoder
from pipeline.sources.photos import crops, write_photos

SHARD_ROWS = 64
DECODE_SIZE = (500, 375)  # pixels of a typical ImageNet photograph
MORE_TO_DECODE = 4  # times as many images where an image takes so much less, that runs are long enough to time
DECODE_CPUS = max(1, cores() - 1)  # all but the encoder's: one unit is decoded at a time
WORK = Path(".bench/precompute")


class AverageEncoder(UnitEncoder):
    """Costs next to nothing: pixels averaged to the coarsest grid, repeated to the arrays' shapes."""

    def load(self) -> str:
        """Nothing."""
        return "cpu"

    def encode(
        self,
        path: str,
        images: Array,
        present: np.ndarray,
        batch: int,
        first_row: int,
        on_batch: Callable[[float], None] = lambda share: None,
    ) -> Mapping[str, Array]:
        """Arrays (n, V, *row_shape) by name."""
        n = len(images)
        means = np.asarray(images)[:, ::16, ::16].reshape(n, -1).astype(np.float16)
        arrays = self._groups[path].layout.arrays
        return {a.name: np.resize(means, (n, int(np.prod(a.shape[1:])))).reshape(n, *a.shape[1:]) for a in arrays}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is precomputed."""

    title: str
    data: Path
    encoder: type[UnitEncoder]
    latents: str = "tiny-vae"
    features: str = "tiny-vit"
    latents_weights: str = ""
    features_weights: str = ""
    resolution: int = 128

    def config(self, store: Path) -> PrecomputeConfig:
        """One encoder, and one core for it where it has no GPU; one for decoding."""
        return PrecomputeConfig(
            data=str(self.data.absolute()), store=str(store), latents=self.latents, features=self.features,
            latents_weights=self.latents_weights, features_weights=self.features_weights, resolution=self.resolution,
            shard_rows=SHARD_ROWS, encoders=1, encoder_cpus=1, decode_cpus=DECODE_CPUS,
        )  # fmt: skip


def make_cases(full_size: bool, n_per_class: int) -> dict[str, Case]:
    """The cases, their images and weights made where they are missing."""
    photos, large = WORK / "photographs", WORK / "large"
    write_photos(photos, n_per_class=n_per_class)
    for name, number, crop in crops("train", n_per_class * MORE_TO_DECODE):
        path = large / name / f"{number:04d}.JPEG"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            crop.resize(DECODE_SIZE).save(buffer, format="JPEG", quality=95)
            path.write_bytes(buffer.getvalue())
    if full_size:
        vae, vit = make_weights()
        full = Case(
            title="SD-VAE and DINOv2-B, 256 px", data=large, encoder=UnitEncoder, latents="sd-vae-ft-mse",
            features="dinov2-vitb14", latents_weights=str(vae), features_weights=str(vit), resolution=256,
        )  # fmt: skip
        return {"full-size": full}
    return {
        "encode-bound": Case(title="built-in encoders, 128 px", data=photos, encoder=UnitEncoder),
        "decode-bound": Case(title="500 × 375 px, averaging encoder", data=large, encoder=AverageEncoder),
    }


def make_weights() -> tuple[Path, Path]:
    """SD-VAE as a diffusers directory and DINOv2-B as timm's file, of seeded random weights."""
    import timm
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    vae, vit = WORK / "sd-vae", WORK / "dinov2-vitb14.safetensors"
    torch.manual_seed(0)
    if not vae.exists():
        blocks = [128, 256, 512, 512]
        AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=blocks, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=256,
        ).save_pretrained(vae)  # fmt: skip
    if not vit.exists():
        save_file(timm.create_model("vit_base_patch14_dinov2.lvd142m", num_classes=0).state_dict(), vit)
    return vae.absolute(), vit.absolute()
