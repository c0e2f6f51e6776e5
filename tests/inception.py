"""Inception with seeded random weights, in the published file's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as library


def write_random_inception(path: Path) -> Path:
    """Write the weights, with batch norms that do something. The library only makes a network from a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        state = library.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
    for name, value in state.items():
        if name.endswith("bn.running_mean"):
            value.normal_(std=0.1)
    torch.save(state, path)
    return path
