"""DINOv2 (arXiv 2304.07193) through timm, with REPA's preprocessing.

x / 255, ImageNet mean and std, then bicubic from R to 7/8 R (256 → 224, 512 → 448) without antialiasing, in this order;
the 37×37 position embedding resampled to R/16 × R/16 tokens by timm's bicubic antialiased resampling. Features are the
final-norm patch tokens and the class token.

Weights: timm's file, from its cache or given; or the original release's file, whose SwiGLU and register names differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.encoders.registry import EncoderSpec, file_sha256
from pipeline.encoders.vision import VisionTransformerEncoder, normalize, read_weights
from storage.errors import UserError

PATCH = 14
TIMM_FILE = "model.safetensors"
WIDTHS = {
    "vit_small_patch14_dinov2.lvd142m": 384,
    "vit_base_patch14_dinov2.lvd142m": 768,
    "vit_large_patch14_dinov2.lvd142m": 1024,
    "vit_giant_patch14_dinov2.lvd142m": 1536,
}


def describe(spec: EncoderSpec, *, resolution: int) -> dict[str, Any]:
    """Identity of the features."""
    if resolution % 16:
        raise UserError(f"--resolution must be a multiple of 16 for {spec.store_name}, got {resolution}")
    return {
        "encoder": f"timm.{spec.model}",
        "weights_sha256": file_sha256(find_weights(spec)),
        "preprocessing": f"x/255, ImageNet mean/std, bicubic {resolution}->{input_size(resolution)} without antialias",
        "layer": "final norm",
        "token_grid": [resolution // 16] * 2,
        "width": WIDTHS[spec.model],
    }


def load(spec: EncoderSpec, *, resolution: int, device: torch.device, dtype: torch.dtype) -> VisionTransformerEncoder:
    """Load the encoder at a crop's resolution."""
    import timm

    model = timm.create_model(spec.model, pretrained=False, num_classes=0, img_size=input_size(resolution))
    path = find_weights(spec)
    load_state(model, read_weights(path), path)
    return VisionTransformerEncoder(model, lambda x: preprocess(x, input_size(resolution)), device, dtype, spec.codec)


def preprocess(x: Tensor, size: int) -> Tensor:
    """x (B, 3, R, R) in [0, 1]: normalise, then resize; resizing first would give other numbers."""
    return F.interpolate(normalize(x), (size, size), mode="bicubic", antialias=False)


def input_size(resolution: int) -> int:
    """Pixels a side that the model sees: 14 for every 16 of the crop."""
    return resolution // 16 * PATCH


def find_weights(spec: EncoderSpec) -> Path:
    """The weight file: the one given, or timm's from the hub cache (fetched when the network allows)."""
    if spec.weights is not None:
        if not spec.weights.is_file():
            raise UserError(f"weight file {spec.weights} of {spec.store_name} does not exist; mend --features-weights")
        return spec.weights
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = f"timm/{spec.model}"
    try:
        try:
            return Path(hf_hub_download(repository, TIMM_FILE, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repository, TIMM_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"weights of {spec.store_name} are neither in the Hugging Face cache nor can they be fetched "
            f"({type(error).__name__}); on a machine with network run `hf download {repository} {TIMM_FILE}` (or take "
            "the original release's .pth) and pass --features-weights FILE"
        ) from None


def load_state(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load timm's or the original layout into a timm VisionTransformer of any input size. Raises UserError."""
    from timm.layers import resample_abs_pos_embed

    state = original_to_timm(state)
    grid = list(model.patch_embed.grid_size)
    n_prefix = 0 if model.no_embed_class else 1
    if "pos_embed" in state:
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=n_prefix)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold the weights of this model ({first}…); pass the right file") from error


def original_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original release's names as timm's; timm's own pass unchanged.

    The mask token is for training only. SwiGLU's packed gate-and-value matrix w12 and output w3 are timm's fc1 and fc2.
    With registers, timm adds no position to prefix tokens: the class token's is folded into it.
    """
    renamed = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
        for name, value in state.items()
        if name != "mask_token"
    }
    if "register_tokens" in renamed:
        position = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:]
    return renamed
