"""Alignment of hidden states with features: one file a kind, and the projector between them.

`ALIGNMENTS` names the kinds as `--loss.alignment` does. A kind is a function of projection and target, each (B, T, D)
of any dtype, that returns each sample's loss, float32 (B,). It is imported when a run uses it.
"""

from __future__ import annotations

ALIGNMENTS = {"cosine": "trainer.alignment.cosine:alignment_loss"}
