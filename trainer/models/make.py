"""The model of a geometry."""

from __future__ import annotations

from trainer.models.ditdh import DiTDH
from trainer.models.lightningdit import LightningDiT
from trainer.models.reg import RegTransformer
from trainer.models.rit import RiT
from trainer.models.transformer import DiffusionTransformer, Geometry

KINDS = {"lightningdit": LightningDiT, "rit": RiT, "ditdh": DiTDH}  # others are SiT's


def make_model(geometry: Geometry) -> DiffusionTransformer:
    """A new model, with weights drawn from torch's global generator."""
    if geometry.class_width and geometry.kind == "sit":
        return RegTransformer(geometry)
    return KINDS.get(geometry.kind, DiffusionTransformer)(geometry)
