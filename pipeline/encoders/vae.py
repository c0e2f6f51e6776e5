"""VAEs of diffusers (`AutoencoderKL`): posterior mean and standard deviation of an image.

Input is x / 127.5 − 1, in [−1, 1]. What is stored is concat(mean, std) on the channel axis, unscaled: the trainer draws
z = (mean + std · ε) · scale afresh at each visit. The standard deviation, not the log-variance, as REPA stores it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoders.registry import EncoderSpec, file_sha256
from storage.errors import UserError

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_directory(model: str, weights: Path | None) -> Path:
    """The directory of the VAE's files: a path, or the hub's cache (fetched when the network allows)."""
    if weights is not None or Path(model).is_dir():
        directory = weights or Path(model)
        if not (directory / CONFIG_FILE).is_file() or not any((directory / name).is_file() for name in WEIGHT_FILES):
            raise UserError(
                f"VAE directory {directory} must hold {CONFIG_FILE} and {WEIGHT_FILES[0]} (as save_pretrained writes)"
            )
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [CONFIG_FILE, WEIGHT_FILES[0]]
    try:
        try:
            return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"weights of VAE {model} are neither in the Hugging Face cache nor can they be fetched "
            f"({type(error).__name__}); on a machine with network run `hf download {model}` and copy the folder "
            "here, then pass --latents-weights FOLDER"
        ) from None


def describe(spec: EncoderSpec, *, resolution: int) -> dict[str, Any]:
    """Identity of the VAE's moments."""
    directory = find_directory(spec.model, spec.weights)
    config = json.loads((directory / CONFIG_FILE).read_text())
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"{directory} holds a {config['_class_name']}; only AutoencoderKL is supported")
    downsampling = 2 ** (len(config["block_out_channels"]) - 1)
    if resolution % downsampling:
        raise UserError(f"--resolution must be a multiple of {downsampling} for {spec.store_name}, got {resolution}")
    return {
        "encoder": "diffusers.AutoencoderKL",
        "weights_sha256": file_sha256(_weight_file(directory)),
        "preprocessing": "x/127.5-1",
        "stored": "concat(posterior mean, posterior std), unscaled",
        "latent_channels": config["latent_channels"],
        "latent_size": [resolution // downsampling] * 2,
        "latent_scale_factor": config.get("scaling_factor", 0.18215),
        "latent_shift_factor": config.get("shift_factor") or 0.0,
    }


def load(spec: EncoderSpec, *, resolution: int, device: torch.device, dtype: torch.dtype) -> VAE:
    """Load the VAE; `resolution` is taken as it comes, the network being convolutional."""
    return VAE(find_directory(spec.model, spec.weights), device, dtype)


class VAE:
    """An AutoencoderKL on a device."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL

        model = AutoencoderKL.from_pretrained(
            directory, torch_dtype=dtype, low_cpu_mem_usage=False, local_files_only=True
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """`moments` float16 (B, 2C, h, w) of images uint8 (B, H, W, 3)."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        posterior = self.model.encode(x).latent_dist
        return {"moments": torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float16).cpu().numpy()}

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of unscaled latents (B, C, h, w)."""
        z = torch.from_numpy(np.ascontiguousarray(latents)).to(self.device, self.dtype)
        pixels = (self.model.decode(z).sample.float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _weight_file(directory: Path) -> Path:
    return next(directory / name for name in WEIGHT_FILES if (directory / name).is_file())
