"""Train the built-in encoders: `python -m pipeline.encoders.tiny.train vae|vit [--minutes 20]`.

`tiny-vae` learns from random crops of the left part of the built-in photographs and is measured on crops of the right
part, of which it never sees a pixel. `tiny-vit` learns from the fixed training crops that the demo writes and is
measured on other crops of the same part: what lies to the right of a cat is not the cat, so a photograph cannot be
named from a part that was never seen (that stricter figure is printed too).

The learning rate falls with the time that is left, so that the result does not hang on how fast the machine is; a
repeated training therefore gives other weights of the same quality, not the same bytes. The committed weights were
trained for 24 minutes (vae) and 6 minutes (vit) on two cores.

`tiny-vae` minimises |x − x̂| + 2 (x − x̂)² + 10⁻⁴ KL(q(z|x) ‖ N(0, 1)), means over pixels and latent elements. The scale
that gives its latents unit variance is measured afterwards and stored as `scaling_factor` (as in arXiv 2112.10752).

`tiny-vit` learns to name the photograph from the mean of its patch tokens (cross-entropy), and at the same time to draw
its own patch at 4×4 pixels from each token (squared error), so that tokens carry what is where and not only the class.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from pipeline.encoders.tiny import RESOLUTION, TINY_VAE, TINY_VIT
from pipeline.sources.photos import CLASSES, crops, load_photograph, random_crop
from pipeline.transforms import center_crop

SEED = 0
VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
}
VIT_CONFIG: dict[str, Any] = {
    "img_size": RESOLUTION,
    "patch_size": 16,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 0,
}
KL_WEIGHT = 1e-4
N_PER_CLASS = 72  # training crops a photograph, as the demo writes them
TOKEN_SIDE = 4  # pixels a side to which tiny-vit draws a patch


def random_batches(side: int, batch: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (images float32 (B, 3, side, side) in [−1, 1], labels (B,)) of random training crops, flipped at random.

    A crop is made at RESOLUTION as the pipeline makes it; a smaller `side` is then cut from it at random.
    """
    photographs = [load_photograph(name) for name in CLASSES]
    while True:
        labels = rng.integers(0, len(CLASSES), batch)
        images = np.empty((batch, side, side, 3), dtype=np.uint8)
        for i, label in enumerate(labels):
            image = center_crop(random_crop(photographs[label], "train", rng), RESOLUTION)
            x, y = rng.integers(0, RESOLUTION - side + 1, 2)
            image = image[y : y + side, x : x + side]
            images[i] = image[:, ::-1] if rng.random() < 0.5 else image
        yield to_float(images), torch.from_numpy(labels)


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def split_images(split: str, n_per_class: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Crops as the pipeline sees them: uint8 (N, H, W, 3) and labels (N,). SEED draws the demo's training crops."""
    cropped = [
        (center_crop(crop, RESOLUTION), CLASSES.index(name)) for name, _, crop in crops(split, n_per_class, seed)
    ]
    images, labels = zip(*cropped, strict=True)
    return np.stack(images), np.array(labels)


def psnr_db(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of uint8 images (N, H, W, 3), dB: 10 log₁₀(255² / MSE)."""
    mse = ((images.astype(np.float64) - others.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-12))


def learning_rate(peak: float, share: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to zero, over the share of the time that has passed."""
    if share < warmup:
        return peak * share / warmup
    return peak * 0.5 * (1 + np.cos(np.pi * min(1.0, (share - warmup) / (1 - warmup))))


def train_vae(seconds: float) -> None:
    """Train tiny-vae and write it as a diffusers directory, float16."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**VAE_CONFIG)
    vae = vae.to(memory_format=torch.channels_last)
    print(f"tiny-vae: {sum(p.numel() for p in vae.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.99))
    batches = random_batches(64, 16, np.random.default_rng(SEED))
    start_s = time.monotonic()
    with tqdm(unit="step") as bar:
        while (share := (time.monotonic() - start_s) / seconds) < 1:
            optimizer.param_groups[0]["lr"] = learning_rate(2e-3, share)
            images = next(batches)[0].contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(images).latent_dist
            error = vae.decode(posterior.sample()).sample - images
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            bar.update()
            if bar.n % 50 == 0:
                bar.set_postfix(
                    done=f"{share:.0%}", loss=f"{loss.item():.4f}", mse=f"{error.square().mean().item():.5f}"
                )
    with torch.inference_mode():
        posterior = vae.encode(to_float(split_images("train", 16)[0])).latent_dist
        vae.register_to_config(scaling_factor=round(1 / posterior.sample().std().item(), 5))
    vae.half().save_pretrained(TINY_VAE)


def train_vit(seconds: float) -> None:
    """Train tiny-vit and write its weights (float16) and its constructor's arguments."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(**VIT_CONFIG)
    print(f"tiny-vit: {sum(p.numel() for p in vit.parameters()):,} parameters")
    name_photograph = torch.nn.Linear(vit.embed_dim, len(CLASSES))
    draw_patch = torch.nn.Linear(vit.embed_dim, 3 * TOKEN_SIDE**2)
    modules = torch.nn.ModuleList([vit, name_photograph, draw_patch])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.0, weight_decay=0.05)
    rng = np.random.default_rng(SEED)
    all_images, all_labels = split_images("train", N_PER_CLASS)
    start_s = time.monotonic()
    with tqdm(unit="step") as bar:
        while (share := (time.monotonic() - start_s) / seconds) < 1:
            optimizer.param_groups[0]["lr"] = learning_rate(1e-3, share)
            picked = rng.integers(0, len(all_images), 64)
            images, labels = to_float(all_images[picked]), torch.from_numpy(all_labels[picked])
            images = images.flip(-1) if rng.random() < 0.5 else images
            # Contrast and brightness vary, so that a class is not just its mean colour.
            gain, shift = (
                torch.from_numpy(rng.uniform(a, b, (len(images), 1, 1, 1))).float()
                for a, b in ((0.7, 1.3), (-0.2, 0.2))
            )
            images = (images * gain + shift).clamp(-1, 1)
            tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
            grid = RESOLUTION // VIT_CONFIG["patch_size"]
            small = F.avg_pool2d(images, VIT_CONFIG["patch_size"] // TOKEN_SIDE)
            patches = small.reshape(len(images), 3, grid, TOKEN_SIDE, grid, TOKEN_SIDE).permute(0, 2, 4, 1, 3, 5)
            drawn = F.mse_loss(draw_patch(tokens), patches.reshape(len(images), grid**2, -1))
            named = F.cross_entropy(name_photograph(tokens.mean(1)), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            (named + 2 * drawn).backward()
            optimizer.step()
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(done=f"{share:.0%}", named=f"{named.item():.4f}", drawn=f"{drawn.item():.5f}")
    TINY_VIT.mkdir(exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in vit.state_dict().items()}, TINY_VIT / "model.safetensors"
    )
    (TINY_VIT / "config.json").write_text(json.dumps(VIT_CONFIG, indent=2) + "\n")


def reconstruct(images: np.ndarray, directory: Path = TINY_VAE) -> np.ndarray:
    """Images uint8 (N, H, W, 3) through posterior mean and decoder, uint8."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(directory, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    with torch.inference_mode():
        decoded = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mean).sample for part in to_float(images).split(32)]
        )
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def probe_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy on the test features (M, D) of a logistic regression on standardised features (N, D)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(probe.fit(features, labels).score(test_features, test_labels))


def measure_vae(n_per_class: int = 16) -> float:
    """Mean PSNR (dB) of held-out crops; prints it for each photograph."""
    images, labels = split_images("heldout", n_per_class)
    db = psnr_db(images, reconstruct(images))
    for label, name in enumerate(CLASSES):
        print(f"  {name:12s} {db[labels == label].mean():5.2f} dB")
    both = np.concatenate([images[::n_per_class], reconstruct(images[::n_per_class])], axis=1)
    Image.fromarray(np.concatenate(list(both), axis=1)).save("runs/tiny-vae.png")
    print(f"tiny-vae: PSNR of held-out crops {db.mean():.2f} dB")
    return float(db.mean())


def measure_vit(n_per_class: int = 32) -> float:
    """Linear-probe accuracy of mean-pooled patch tokens on crops outside the training set; prints it."""
    from pipeline.encoders import registry

    spec = registry.resolve_features("tiny-vit")
    encoder = registry.load(spec, resolution=RESOLUTION, device=torch.device("cpu"))
    pooled = []
    for split, seed in (("train", SEED), ("train", SEED + 1), ("heldout", SEED)):
        images, labels = split_images(split, n_per_class, seed)
        patches = torch.cat([encoder.encode(part)["patches"] for part in torch.from_numpy(images).tensor_split(8)])
        pooled.append((patches.numpy().astype(np.float32).mean(axis=1), labels))
    accuracy = probe_accuracy(*pooled[0], *pooled[1])
    print(f"tiny-vit: linear probe on crops outside the training set {accuracy:.1%}, ", end="")
    print(f"on the part of the photographs never seen {probe_accuracy(*pooled[0], *pooled[2]):.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", choices=["vae", "vit"])
    parser.add_argument("--minutes", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    Path("runs").mkdir(exist_ok=True)
    if arguments.encoder == "vae":
        train_vae(arguments.minutes * 60)
        measure_vae()
    else:
        train_vit(arguments.minutes * 60)
        measure_vit()
