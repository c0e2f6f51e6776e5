"""Train the demo's vision encoders: `python -m pipeline.encoders.glyph.train glyph-vit|glyph-namer`.

Both learn from labels, on digits in the style FOR_ENCODERS over the left part of the built-in photographs, and are
measured on the demo's fonts over the right part: of a font, a digit's drawing or a background that is measured they saw
nothing. They name the digit from the mean of their patch tokens (cross-entropy), and say from each token which of its
patch's 4×4 parts the digit covers (binary cross-entropy), so that tokens carry what and where; without the second task
the first is not learnt in so few steps. The two have another width, seed and images.

A training is a function of its seed: steps are counted, not timed, and images are drawn by number. Each of the
committed weights took some four minutes of one core (with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.encoders.glyph import GLYPH_NAMER, GLYPH_VIT
from pipeline.encoders.tiny.train import learning_rate, probe_accuracy, to_float
from pipeline.sources.glyphs import CLASSES, DEMO, FOR_ENCODERS, RESOLUTION, Style, glyph

N_PER_CLASS, BATCH, STEPS = 600, 64, 1200
PATCH, PARTS = 16, 4  # a patch's side in pixels, and in the parts that glyph-vit looks at
FOLDERS = {"glyph-vit": GLYPH_VIT, "glyph-namer": GLYPH_NAMER}
CONFIGS: dict[str, dict[str, Any]] = {
    name: {"img_size": RESOLUTION, "patch_size": PATCH, "num_classes": 0, **size}
    for name, size in {
        "glyph-vit": {"embed_dim": 96, "depth": 4, "num_heads": 3},
        "glyph-namer": {"embed_dim": 64, "depth": 4, "num_heads": 4},
    }.items()
}
SEEDS = {"glyph-vit": 1, "glyph-namer": 2}  # of weights and images; the demo's images have 0


def digits(split: str, n_per_class: int, seed: int, style: Style) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (N, side, side, 3), labels (N,), and what digits cover, float32 (N, side, side)."""
    drawn = [
        (*glyph(split, label, number, seed=seed, style=style), label)
        for label in range(len(CLASSES))
        for number in range(n_per_class)
    ]
    images, covered, labels = zip(*drawn, strict=True)
    return np.stack(images), np.array(labels), np.stack(covered)


def of_patches(covered: Tensor) -> Tensor:
    """What a digit covers (B, side, side) as means of each patch's parts: (B, tokens, PARTS²)."""
    b, side = len(covered), RESOLUTION // PATCH
    parts = F.avg_pool2d(covered[:, None], PATCH // PARTS).reshape(b, side, PARTS, side, PARTS)
    return parts.transpose(2, 3).reshape(b, side**2, PARTS**2)


def train(name: str, steps: int) -> None:
    """Train an encoder and write its weights (float16) and its constructor's arguments."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(SEEDS[name])
    vit = VisionTransformer(**CONFIGS[name])
    print(f"{name}: {sum(p.numel() for p in vit.parameters()):,} parameters")
    names, covers = torch.nn.Linear(vit.embed_dim, len(CLASSES)), torch.nn.Linear(vit.embed_dim, PARTS**2)
    modules = torch.nn.ModuleList([vit, names, covers])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.0, weight_decay=0.05)
    images, labels, covered = digits("train", N_PER_CLASS, SEEDS[name], FOR_ENCODERS)
    rng = np.random.default_rng(SEEDS[name])
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(2e-3, step / steps, warmup=0.05)
        picked = rng.integers(0, len(images), BATCH)
        shift = tuple(rng.integers(-6, 7, 2))
        x = to_float(np.roll(images[picked], shift, (1, 2)))
        # Contrast, brightness and which is which of ink and paper vary, so that a class has no colour.
        sign = torch.from_numpy(rng.choice([-1.0, 1.0], (BATCH, 1, 1, 1))).float()
        gain, offset = (
            torch.from_numpy(rng.uniform(a, b, (BATCH, 3, 1, 1))).float() for a, b in ((0.6, 1.2), (-0.2, 0.2))
        )
        x = (x * sign * gain + offset).clamp(-1, 1)
        x = F.avg_pool2d(x, 3, 1, 1) if rng.random() < 0.5 else x  # as sharp as an autoencoder's pictures, or sharper
        tokens = vit.forward_features(x)[:, vit.num_prefix_tokens :]
        named = F.cross_entropy(names(tokens.mean(1)), torch.from_numpy(labels[picked]), label_smoothing=0.1)
        target = of_patches(torch.from_numpy(np.roll(covered[picked], shift, (1, 2))))
        loss = named + F.binary_cross_entropy_with_logits(covers(tokens), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(named=f"{named.item():.3f}", loss=f"{loss.item():.3f}")
    folder = FOLDERS[name]
    folder.mkdir(exist_ok=True)
    state = {key: value.half().contiguous() for key, value in vit.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")


def pooled(name: str, images: np.ndarray) -> np.ndarray:
    """Means of patch tokens, float32 (N, D), through the encoder as the pipeline loads it."""
    from pipeline.encoders import registry

    encoder = registry.load(registry.resolve_features(name), resolution=RESOLUTION, device=torch.device("cpu"))
    parts = [registry.encode_images(encoder, part)["patches"] for part in np.array_split(images, len(images) // 64 + 1)]
    return np.concatenate(parts).astype(np.float32).mean(axis=1)


def measure(name: str, n_per_class: int = 24) -> float:
    """Share of held-out digits in the demo's fonts that a linear probe of others in these fonts names; prints it."""
    images, labels, _ = digits("train", n_per_class, 0, DEMO)
    others, their_labels, _ = digits("heldout", n_per_class // 3, 0, DEMO)
    accuracy = probe_accuracy(pooled(name, images), labels, pooled(name, others), their_labels)
    print(f"{name}: linear probe on held-out digits in fonts that it was not trained on {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", choices=FOLDERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.encoder, arguments.steps)
    measure(arguments.encoder)
