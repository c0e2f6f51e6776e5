"""Decoders that lie in this repository: their names, where they are, and which run's latents they are of.

They lie below `pipeline/`, which trains them; the package is found here, and never imported. A decoder names the
encoder whose tokens it takes by the SHA-256 of its weights, so that a run on these tokens makes pictures of them
without being told how.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from storage.final_norm import AFFINE, PLAIN
from storage.identity import FeaturesIdentity

FOLDERS = {"glyph-decoder": "encoders/glyph/glyph-decoder"}  # below pipeline/
# In a decoder's configuration, beside what diffusers has there.
ENCODER_SHA256 = "encoder_weights_sha256"
ENCODER_LAYER = "encoder_layer"  # as the features' identity says it; without, the final norm


def folder_of(name: str) -> str:
    """Where a decoder lies: the folder of a built-in one, or what was given."""
    found = importlib.util.find_spec("pipeline") if name in FOLDERS else None
    if found is None or found.origin is None or Path(name).is_dir():
        return name
    return str(Path(found.origin).parent / FOLDERS[name])


def decoder_for(identity: FeaturesIdentity) -> str:
    """The name of the built-in decoder of an encoder's tokens, "" where there is none."""
    if identity.layer not in (AFFINE, PLAIN):
        return ""
    for name in FOLDERS:
        config = Path(folder_of(name)) / "config.json"
        if config.is_file() and json.loads(config.read_text()).get(ENCODER_SHA256) == identity.weights_sha256:
            return name
    return ""
