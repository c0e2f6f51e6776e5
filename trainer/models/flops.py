"""What a forward pass costs, counted on the model itself."""

from __future__ import annotations

import functools

import torch

from trainer.models.make import make_model
from trainer.models.transformer import Geometry

OF_PATCHES = ("x_embedder.", "s_embedder.", "s_projector.", "final_layer.linear.")
OF_IMAGES = ("t_embedder.", "cls_projectors.", "cls_projectors2.", "final_layer.linear_cls.")
PROJECTORS = "projectors."
NOT_MULTIPLIED = ("pos_embed", "in_context_posemb", "y_embedder.")


@functools.lru_cache(maxsize=8)
def forward_flops_per_image(config: Geometry, with_projections: bool = True) -> int:
    """Multiply-adds of one image's forward pass times two: convolution, linear layers, attention, projectors that run.

    Norms, activations and the label look-up are left out, as is usual. A training step costs three times this. Each
    entry of a matrix or kernel is one multiplication: a token, a patch, or an image, as its layer is applied.
    """
    with torch.device("meta"):
        model = make_model(config)
    n_multiplications = sum(2 * tokens**2 * width for tokens, width in config.sequences)  # scores, what they weigh
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.startswith(NOT_MULTIPLIED):
            continue
        if name.startswith(PROJECTORS) and not with_projections:
            continue
        n_multiplications += parameter.numel() * _times_applied(name, config)
    return 2 * n_multiplications


def _times_applied(name: str, config: Geometry) -> int:
    """How often a matrix is applied to one image."""
    n_patches = config.grid**2
    kind, _, rest = name.partition(".")
    number = int(rest.partition(".")[0]) if kind == "blocks" else config.depth + config.head_depth - 1
    if ".adaLN_modulation." in name:
        return n_patches if number >= config.depth else 1  # a head's is of each token
    if kind == "blocks":
        return config.sequences[number][0]
    if name.startswith(OF_IMAGES):
        return 1
    if name.startswith(PROJECTORS):
        return n_patches + config.aligns_class_token
    assert name.startswith(OF_PATCHES), name
    return n_patches
