"""The demo's vision encoders, timm VisionTransformers of patch 16 at 64 px, trained by `train.py` on digits.

`glyph-vit` is what the demo aligns with, `glyph-namer` what it measures with, so that no distance is measured in the
features that one model was trained towards and the other was not. Both have seen digits of other fonts than
the demo's, and nothing else: never compare a model trained on them with anything.

`glyph-decoder` makes pictures of glyph-vit's tokens, for runs that have these as latents (`train_decoder.py`).
"""

from pathlib import Path

GLYPH_VIT = Path(__file__).parent / "glyph-vit"
GLYPH_NAMER = Path(__file__).parent / "glyph-namer"
GLYPH_DECODER = Path(__file__).parent / "glyph-decoder"
