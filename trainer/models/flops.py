"""What a forward pass costs, counted on the model itself."""

from __future__ import annotations

import functools

import torch

from trainer.models.make import make_model
from trainer.models.transformer import Geometry

OF_PATCHES = ("x_embedder.", "final_layer.linear.")
OF_IMAGES = ("t_embedder.", "cls_projectors2.", "final_layer.linear_cls.")
PROJECTORS = "projectors."
NOT_MULTIPLIED = ("pos_embed", "y_embedder.")


@functools.lru_cache(maxsize=8)
def forward_flops_per_image(config: Geometry, with_projections: bool = True) -> int:
    """Multiply-adds of one image's forward pass times two: convolution, linear layers, attention, projectors that run.

    Norms, activations and the label look-up are left out, as is usual. A training step costs three times this. Each
    entry of a matrix or kernel is one multiplication: a token, a patch, or an image, as its layer is applied.
    """
    with torch.device("meta"):
        model = make_model(config)
    n_patches = config.grid**2
    n_multiplications = 2 * config.n_tokens**2 * config.width * config.depth  # scores, and what they weigh
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.startswith(NOT_MULTIPLIED):
            continue
        if name.startswith(PROJECTORS) and not with_projections:
            continue
        if name.startswith(OF_IMAGES) or ".adaLN_modulation." in name:
            n_multiplications += parameter.numel()
        else:
            n_multiplications += parameter.numel() * (n_patches if name.startswith(OF_PATCHES) else config.n_tokens)
    return 2 * n_multiplications
