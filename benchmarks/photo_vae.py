"""An autoencoder for photographs that no built-in one knows: train it, measure it on others, look at it.

    python -m benchmarks.photo_vae --data TRAIN --heldout HELDOUT --out FOLDER [--steps 8000] [--threads 2]

TRAIN and HELDOUT are whatever `python -m pipeline precompute --data` takes; images are cropped as it crops them. FOLDER
becomes a diffusers AutoencoderKL (8× downsampling, 4 latent channels) that `precompute --latents FOLDER` loads, with
PSNR of the held-out images in `psnr.json` and originals beside reconstructions in `contact-sheet.png`.

What is minimised is the mean over images of log MSE, which is −PSNR up to a factor, plus KL_WEIGHT times the mean KL of
a latent element. Only the ratio of noise to signal costs reconstruction, so the KL term settles the scale near one;
`scaling_factor` is 1 / the deviation of draws from the posterior, measured on the training images (arXiv 2112.10752).

Crops of half the side are cheaper and as good to learn textures from; the last quarter of the steps sees whole images,
since attention and group norms work over all pixels, while the learning rate falls to zero. What a step sees is a
function of (SEED, step), and the state is saved every `--save-every` steps and on SIGTERM or Ctrl-C: the same command
goes on. Cost: a step of 16 crops of 64 px takes 1.3 s of two cores with AVX2 in float32 that do nothing else, and
twelve where something else runs on one of them. `--precision bf16` is for GPUs and for CPUs with matrix units of that
width (AMX); on one without them it is thirteen times slower than float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from benchmarks.resumable import FALLING, Resumable, learning_rate, train
from pipeline.decode import decode_unit
from pipeline.encoders.tiny.train import psnr_db, to_float
from pipeline.encoders.vae import VAE
from pipeline.sources import open_source
from storage.base.errors import UserError
from storage.base.files import write_atomic
from storage.roots import absolute
from trainer.evaluation.generate.decode import grid
from trainer.ranks.world import device_named

Precision = Literal["fp32", "bf16"]
CPU = torch.device("cpu")
SEED = 0
KL_WEIGHT = 0.01
PEAK_LR = 2e-3  # of both optimisers: see `resumable.py`
N_SHOWN = 48
VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 48, 128, 192),  # full resolution costs most and gains least
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


def read_images(data: str, resolution: int) -> np.ndarray:
    """Every image of a source as the pipeline crops it, uint8 (N, side, side, 3). Raises UserError if one fails."""
    source = open_source(absolute(data))
    index = source.listing().index
    images, (failures, *_) = decode_unit(source, 0, index.keys, index.locations, resolution)
    if failures:
        raise UserError(f"{data}: {failures[0].key} cannot be decoded ({failures[0].reason}); leave such images out")
    return images


def batch_of(images: np.ndarray, step: int, steps: int, batch: int) -> torch.Tensor:
    """What a step sees, float32 (B, 3, s, s) in [−1, 1], flipped by coin: crops, later as many pixels of wholes."""
    rng = np.random.default_rng([SEED, step])
    resolution = images.shape[1]
    is_whole = step >= steps * (1 - FALLING)
    side, n = (resolution, max(1, batch // 4)) if is_whole else (resolution // 2, batch)
    crops = np.empty((n, side, side, 3), dtype=np.uint8)
    for i, picked in enumerate(rng.integers(0, len(images), n)):
        x, y = rng.integers(0, resolution - side + 1, 2)
        crop = images[picked, y : y + side, x : x + side]
        crops[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return to_float(crops)


class Training(Resumable):
    """An autoencoder that learns images uint8 (N, side, side, 3), `batch` crops a step."""

    def __init__(
        self,
        out: Path,
        images: np.ndarray,
        batch: int,
        start: Path | None = None,
        device: torch.device = CPU,
        precision: Precision = "fp32",
    ) -> None:
        from diffusers import AutoencoderKL

        torch.manual_seed(SEED)
        vae: Any
        if start is None:
            vae = AutoencoderKL(**VAE_CONFIG, sample_size=images.shape[1])
        else:
            vae = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self.images, self.batch, self.precision = images, batch, precision
        super().__init__(self.vae, out, device)

    def take(self, steps: int) -> float:
        """One step; returns the mean PSNR of the batch, dB."""
        images = batch_of(self.images, self.step, steps, self.batch)
        images = images.to(self.device, memory_format=torch.channels_last)
        torch.manual_seed(self.step)  # of the posterior's draws
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            posterior = self.vae.encode(images).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample
        log_mse = (decoded.float() - images).square().mean((1, 2, 3)).clamp(min=1e-8).log().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        self.follow(log_mse + KL_WEIGHT * kl, learning_rate(PEAK_LR, self.step, steps))
        return 10 * (np.log10(4.0) - log_mse.item() / np.log(10))

    @torch.no_grad()
    def write(self, out: Path) -> None:
        """The diffusers folder, with the scale of its latents on a thousand of the images; float32."""
        images = self.images[:: max(1, len(self.images) // 1000)]
        drawn = [self.vae.encode(part.to(self.device)).latent_dist.sample() for part in to_float(images).split(32)]
        self.vae.register_to_config(scaling_factor=round(1 / torch.cat(drawn).std().item(), 5))
        self.vae.save_pretrained(out)


def train_all(args: argparse.Namespace, images: np.ndarray) -> bool:
    """Take the steps that are missing and write the folder; returns whether all are done."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    training = Training(out, images, args.batch, args.start, args.device, args.precision)
    if not train(training, args.steps, args.save_every, "photo-vae"):
        return False
    training.write(out)
    return True


def measure(out: Path, images: np.ndarray, device: torch.device = CPU) -> dict[str, float]:
    """PSNR of images through the encoder that the pipeline loads from `out`; writes psnr.json and the contact sheet."""
    vae = VAE(out, device)
    decoded = []
    for part in np.array_split(images, max(1, len(images) // 32)):
        moments = vae.encode(torch.from_numpy(part))["moments"].float().numpy()
        decoded.append(vae.decode(moments[:, : moments.shape[1] // 2]))
    return write_measures(out, images, np.concatenate(decoded))


def write_measures(out: Path, images: np.ndarray, reconstructions: np.ndarray) -> dict[str, float]:
    """Write and return psnr.json, and draw originals beside reconstructions."""
    db = psnr_db(images, reconstructions)
    found = {"n": len(db), "mean_db": db.mean(), "least_db": db.min(), "median_db": np.median(db), "most_db": db.max()}
    found = {name: round(float(value), 3) for name, value in found.items()}
    write_atomic(out / "psnr.json", json.dumps(found, indent=1).encode(), "photo_vae")
    shown = np.linspace(0, len(images) - 1, min(N_SHOWN, len(images))).astype(int)
    pairs = np.concatenate([images[shown], reconstructions[shown]], axis=2)
    Image.fromarray(grid(pairs, columns=min(4, len(shown)))).save(out / "contact-sheet.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images to learn from")
    parser.add_argument("--heldout", required=True, help="images to measure on")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--start", type=Path, help="diffusers folder of an AutoencoderKL to go on from, its size too")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16, help="crops of half the side a step; a quarter as many wholes")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--only-measure", action="store_true", help="measure what is in the folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device = device_named(args.device)
    args.precision = args.precision or ("fp32" if args.device.type == "cpu" else "bf16")
    if args.only_measure or train_all(args, read_images(args.data, args.resolution)):
        print(json.dumps(measure(args.out, read_images(args.heldout, args.resolution), args.device)))


if __name__ == "__main__":
    main()
