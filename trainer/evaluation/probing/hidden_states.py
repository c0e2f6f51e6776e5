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
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import sample_latents
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
    progress: Callable[[int], object] = lambda n: None,
) -> dict[int, Tensor]:
    """Block (counted from 1) → float32 (len(rows), D) on `device`, of `latents`' rows at time t."""
    states = {block: torch.empty(len(rows), run.geometry.width, device=device) for block in blocks}
    moments = latents["moments"]
    now = slice(0, 0)

    def keep(block: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, arguments: object, tokens: Tensor) -> None:
            states[block][now] = tokens.float().mean(dim=1)

        return hook

    inner: nn.ModuleList = model.blocks  # type: ignore[assignment]
    hooks = [inner[block - 1].register_forward_hook(keep(block)) for block in blocks]
    try:
        for start in range(0, len(rows), batch):
            now = slice(start, min(start + batch, len(rows)))
            stored = np.empty((now.stop - now.start, *moments.row_shape), dtype=moments.dtype)
            moments.read_into(rows[now], 0, stored)
            x_t, times = noisy_latents(torch.from_numpy(stored).to(device), rows[now], t, run, seed)
            null = torch.full((len(x_t),), run.geometry.n_classes, dtype=torch.int64, device=device)
            with model_arithmetic(run.config.precision, device):
                model(x_t, times, null, with_projections=False)
            progress(len(x_t))
    finally:
        for handle in hooks:
            handle.remove()
    return states


def noisy_latents(moments: Tensor, rows: np.ndarray, t: float, run: OpenRun, seed: int) -> tuple[Tensor, Tensor]:
    """x_t float32 (B, C, h, w) of stored moments with the draws of the rows, and what the model is given as t (B,)."""
    index = torch.from_numpy(rows).to(moments.device)
    x = sample_latents(
        Batch(step=0, rows=index, labels=index, moments=moments, targets=(), stall_s=0.0), run.scale, seed
    )
    noise = random_keys.normal(seed, "noise", 0, index, x.shape[1:])
    objective = OBJECTIVES[run.config.model.kind]
    times = objective.model_times(torch.full((len(x),), t, device=x.device))
    return objective.perturb(x, noise, times, run.config.loss), times
