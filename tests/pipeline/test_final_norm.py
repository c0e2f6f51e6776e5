"""What an encoder's final norm was is recorded beside its features, from its own weight file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.encoders import registry
from storage.final_norm import final_norm_of
from storage.identity import FeaturesIdentity
from tests.pipeline.test_vision_families import FAMILIES, WIDTH, small_spec


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("dinov2-vitb14", "norm"),
        ("mocov3-vitl16", "norm"),
        ("clip-vitl14:layer=norm", "visual.ln_post"),
        ("dinov2-vitb14:norm=plain", None),
        ("dinov2-vitb14:layer=2", None),
    ],
)
def test_what_the_final_norm_was_is_recorded(tmp_path: Path, name: str, norm: str | None) -> None:
    """Under whatever name the original has it; of the base encoder of MoCo v3, not of its momentum copy."""
    family = FAMILIES[name.partition(":")[0]]
    family.write(family.state, tmp_path / family.filename)
    spec = small_spec(name, tmp_path / family.filename)
    recorded = registry.attributes(spec)
    found = final_norm_of(recorded, FeaturesIdentity(name="x", encoder="x", width=WIDTH), "x")
    assert (found is None) == (norm is None)
    if found is not None:
        half = {n: v.half().float() for n, v in family.state.items()} if name.startswith("clip") else family.state
        np.testing.assert_array_equal(found.weight, half[f"{norm}.weight"])
        np.testing.assert_array_equal(found.bias, half[f"{norm}.bias"])
