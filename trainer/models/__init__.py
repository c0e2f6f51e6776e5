"""Diffusion transformers, with the public checkpoints' parameter names and shapes."""

from __future__ import annotations

from trainer.models.reg import RegTransformer
from trainer.models.transformer import DiffusionTransformer, Geometry


def make_model(geometry: Geometry) -> DiffusionTransformer:
    """The model of a geometry, with weights drawn from torch's global generator."""
    return RegTransformer(geometry) if geometry.class_width else DiffusionTransformer(geometry)
