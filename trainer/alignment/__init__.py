"""Alignment of hidden states with features: one file a kind, and the projector between them.

A kind is a function of projection and target, each (B, T, D) of any dtype, that returns each sample's loss, float32
(B,). `ALIGNMENTS` names the kinds as `--loss.alignment` does; the function is imported when a run uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.base.commands import imported

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ALIGNMENTS = {"cosine": "trainer.alignment.cosine:alignment_loss"}
_IMPORTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}  # a dictionary, which torch.compile reads


def alignment_named(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of one of `ALIGNMENTS`."""
    spelling = ALIGNMENTS[name]
    if spelling not in _IMPORTED:
        _IMPORTED[spelling] = imported(spelling)
    return _IMPORTED[spelling]
