"""What a trained model computes inside: each block's output, averaged over patches, for noisy latents of chosen rows.

As REPA's analysis was made (arXiv 2410.06940, figures 2 and 3, and its authors' answers to questions about them): no
class label is given, so that none can leak, and a sample's tokens are averaged into one vector. Latents are drawn from
the stored posteriors and noised at one time t; draws are keyed by (seed, purpose, row), so a row's noise is the same in
every run, checkpoint, time and batch size.

Hidden states are collected by forward hooks; the model's code knows nothing of it. Memory: rows × blocks × width
float32 for one t, 1.3 GB for 10,000 rows of SiT-XL's 28 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from storage import GroupReader
from trainer.data.feature_latents import read_latents
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import sample_latents
from trainer.models.reg import join
from trainer.objectives import OBJECTIVES
from trainer.ranks.arithmetic import model_arithmetic
from trainer.run.opened import OpenRun


@torch.inference_mode()
def pooled_hidden_states(
    model: nn.Module,
    run: OpenRun,
    latents: GroupReader,
    rows: np.ndarray,
    t: float,
    blocks: Sequence[int],
    *,
    seed: int,
    batch: int,
    device: torch.device,
    class_tokens: GroupReader | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[int, Tensor]:
    """Block (counted from 1, a head's last) → float32 (len(rows), D) on `device`, of `latents`' rows at time t.

    A model that denoises class tokens is given those of `class_tokens`' rows; tokens before the patches' are not
    averaged.
    """
    geometry = run.geometry
    n_patches, widths = geometry.grid**2, [width for _, width in geometry.sequences]
    states = {block: torch.empty(len(rows), widths[block - 1], device=device) for block in blocks}
    now = slice(0, 0)

    def keep(block: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, arguments: object, tokens: Tensor) -> None:
            states[block][now] = tokens[:, -n_patches:].float().mean(dim=1)

        return hook

    inner: nn.ModuleList = model.blocks  # type: ignore[assignment]
    hooks = [inner[block - 1].register_forward_hook(keep(block)) for block in blocks]
    try:
        for start in range(0, len(rows), batch):
            now = slice(start, min(start + batch, len(rows)))
            stored = read_latents(latents, rows[now]).to(device)
            of_class = read_rows(class_tokens, "cls", rows[now]).to(device) if class_tokens is not None else None
            x_t, times = noisy_latents(stored, rows[now], t, run, seed, of_class)
            null = torch.full((len(x_t),), run.geometry.n_classes, dtype=torch.int64, device=device)
            with model_arithmetic(run.config.precision, device):
                model(x_t, times, null, with_projections=False)
            progress(len(x_t))
    finally:
        for handle in hooks:
            handle.remove()
    return states


def read_rows(group: GroupReader, name: str, rows: np.ndarray) -> Tensor:
    """Rows of an array, as they are stored, the first view."""
    array = np.empty((len(rows), *group[name].row_shape), dtype=group[name].dtype)
    group[name].read_into(rows, 0, array)
    return torch.from_numpy(array)


def noisy_latents(
    moments: Tensor, rows: np.ndarray, t: float, run: OpenRun, seed: int, class_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_t of stored moments with the draws of the rows, float32, and what the model is given as t (B,).

    x_t is (B, C, h, w), or (B, C·h·w + c) with class tokens (B, c).
    """
    index = torch.from_numpy(rows).to(moments.device)
    x = sample_latents(
        Batch(step=0, rows=index, labels=index, moments=moments, targets=(), stall_s=0.0), run.scale, seed
    )
    noise = random_keys.normal(seed, "noise", 0, index, x.shape[1:])
    if class_tokens is not None:
        x = join(x, run.scale.normalised_class(class_tokens))
        if run.config.loss.class_noise == "mean":
            noise = join(noise, noise.mean((2, 3)))
        else:
            noise = join(noise, random_keys.normal(seed, "class-noise", 0, index, class_tokens.shape[1:]))
    objective = OBJECTIVES[run.config.model.kind]
    times = objective.model_times(torch.full((len(x),), t, device=x.device))
    return objective.perturb(x, noise, times, run.config.loss), times
