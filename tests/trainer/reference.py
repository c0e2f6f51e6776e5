"""The vectors computed with the public implementations (tests/data/), and the models that they were computed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.alignment import alignment_named
from trainer.models.make import make_model
from trainer.models.transformer import DiffusionTransformer, Geometry

FILES = {
    "sit": "sit_linear.npz",
    "dit": "dit.npz",
    "irepa": "irepa.npz",
    "reg": "reg.npz",
    "lightningdit": "lightningdit.npz",
    "ditdh": "rae_ditdh.npz",
}
SIT = Geometry(
    kind="sit", input_size=8, channels=4, patch=2, width=48, depth=4, heads=4, n_classes=1000, targets=((2, 40),),
    projector_width=64,
)  # fmt: skip
GEOMETRIES = {
    "sit": SIT,
    "dit": replace(SIT, kind="dit", depth=3, targets=(), projector_width=2048),
    "irepa": replace(SIT, depth=3, alignments=(alignment_named("irepa"),)),
    "reg": replace(SIT, depth=3, class_width=40),
    "lightningdit": replace(
        SIT, kind="lightningdit", input_size=4, channels=8, patch=1, depth=3, n_classes=10, targets=()
    ),
    "rit": replace(
        SIT, kind="rit", input_size=4, channels=24, patch=1, n_classes=10, targets=(), qk_norm=True, class_width=24,
        context=5, context_block=3,
    ),
    "ditdh": replace(
        SIT, kind="ditdh", input_size=4, channels=24, patch=1, depth=3, n_classes=10, targets=(), head_width=64,
        head_depth=2, head_heads=4,
    ),
}  # fmt: skip
WEAKER = replace(
    GEOMETRIES["ditdh"], width=24, depth=2, heads=2, head_width=40, head_heads=2
)  # of autoguidance, `ag_state/*`


def load_reference(kind: str) -> dict[str, Tensor]:
    """Every array of the file; `state/*` are the model's parameters."""
    with np.load(Path(__file__).parents[1] / "data" / FILES.get(kind, f"{kind}.npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def reference_state(kind: str, prefix: str = "state/") -> dict[str, Tensor]:
    """The parameters under the public names."""
    return {n.removeprefix(prefix): v for n, v in load_reference(kind).items() if n.startswith(prefix)}


def reference_model(kind: str) -> DiffusionTransformer:
    """The model with the public implementation's parameters, in which none is missing and none too many."""
    model = make_model(GEOMETRIES[kind])
    model.load_state_dict(reference_state(kind), strict=True)
    return model
