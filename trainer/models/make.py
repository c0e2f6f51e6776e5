"""The model of a geometry."""

from __future__ import annotations

from trainer.models.lightningdit import LightningDiT
from trainer.models.reg import RegTransformer
from trainer.models.transformer import DiffusionTransformer, Geometry


def make_model(geometry: Geometry) -> DiffusionTransformer:
    """A new model, with weights drawn from torch's global generator."""
    if geometry.class_width:
        return RegTransformer(geometry)
    return LightningDiT(geometry) if geometry.kind == "lightningdit" else DiffusionTransformer(geometry)
