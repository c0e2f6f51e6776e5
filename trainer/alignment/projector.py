"""The projector h_φ of REPA (arXiv 2410.06940): three linear layers with SiLU, from hidden states to features."""

from __future__ import annotations

from torch import nn


def make_projector(width: int, hidden: int, target_width: int) -> nn.Sequential:
    """(…, width) → (…, target_width); parameter names `0`, `2`, `4` as in the public checkpoints."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target_width)
    )
