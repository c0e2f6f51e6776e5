"""What options of both stages offer: neither imports the other."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Token = Literal["cls", "mean"]  # a vision encoder's vector of an image
INCEPTION = "inception"  # the describing network of the published FIDs
CMMD = "cmmd-clip"  # the describing network of CMMD (arXiv 2401.09603)
FDR6 = ("fdr-convnext", "fdr-dinov2", "fdr-mae", "fdr-siglip", "fdr-clip")  # of FDr⁶, beside Inception
SPACES = (*FDR6, CMMD)  # networks at a size of their own, `pipeline/encoders/spaces.py`
