"""Latents to pictures. diffusers and PIL are imported here inside functions, and nowhere else in the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.errors import UserError

DECODE_BATCH = 16


@torch.inference_mode()
def decode_latents(latents: Tensor, vae: str, device: torch.device, *, fetch: bool = True) -> np.ndarray:
    """Images uint8 (N, H, W, 3) of unscaled latents (N, C, h, w), by the diffusers VAE at a directory or hub id.

    Without `fetch`, only what lies on this machine will do. Raises UserError when there is no VAE to be had.
    """
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(
            vae, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=not fetch
        )
    except OSError as error:
        raise UserError(
            f"the VAE {vae} cannot be loaded ({str(error).splitlines()[0]}); pass --vae with a diffusers directory"
        ) from error
    model = model.to(device).eval()
    pixels = torch.cat([model.decode(part.float().to(device)).sample.cpu() for part in latents.split(DECODE_BATCH)])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _columns(n: int) -> int:
    """Columns of a full rectangle that is not much wider than high, else of the squarest grid with a gap at its end."""
    squarest = math.ceil(math.sqrt(n))
    return next((c for c in range(squarest, 2 * squarest + 1) if n % c == 0), squarest)


def grid(images: np.ndarray, columns: int = 0, gap: int = 2) -> np.ndarray:
    """One picture uint8 (H, W, 3) of images (N, h, w, 3) in rows, as square as it gets unless `columns` is given."""
    n, height, width, _ = images.shape
    columns = columns or _columns(n)
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_grid(images: np.ndarray, path: Path, columns: int = 0) -> np.ndarray:
    """A PNG of `grid(images, columns)`, which is returned too."""
    from PIL import Image

    canvas = grid(images, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)
    return canvas
