"""What vision transformers of timm share: running one on a batch, and reading a weight file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.quantise import quantise
from storage.codec import Int8Codec
from storage.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionTransformerEncoder:
    """A timm VisionTransformer whose final-norm tokens are the features; register tokens are left out."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype,
        codec: Int8Codec | None = None,
    ) -> None:
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.preprocess, self.device, self.dtype, self.codec = preprocess, device, dtype, codec

    @torch.inference_mode()
    def encode_tokens(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, T, D) and class token (B, D) in the model's dtype, of images uint8 (B, H, W, 3)."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        tokens = self.model.forward_features(self.preprocess(x).to(self.dtype))
        return tokens[:, self.model.num_prefix_tokens :], tokens[:, 0]

    def encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """`patches` float16 (B, T, D) and `cls` float16 (B, D); with a codec `patches` int8 and `scale` (B, T, G)."""
        patches, cls = self.encode_tokens(images)
        arrays = {"cls": cls.to(torch.float16)}
        if self.codec is None:
            arrays["patches"] = patches.to(torch.float16)
        else:
            arrays["patches"], arrays["scale"] = quantise(patches, self.codec)
        return {name: array.cpu().numpy() for name, array in arrays.items()}


def normalize(x: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """(x − mean) / std per channel, x (B, 3, H, W) in [0, 1]."""
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth or .pt file; pickled code is never run. Raises UserError."""
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist; pass a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise their own kinds for a damaged file
        raise UserError(f"weight file {path} cannot be read: {str(error).splitlines()[0]}") from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return state
