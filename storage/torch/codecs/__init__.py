"""Codecs on a device: encoding where the vision encoder runs, decoding where the model trains.

`TWINS` maps a codec's name to its twin in torch. A codec without a line here is computed on the host (`HostTwin`).
"""

from __future__ import annotations

from typing import Any

from storage.base.commands import imported
from storage.codecs import Codec
from storage.torch.codecs.twin import HostTwin, Tokens, Twin

__all__ = ["TWINS", "Tokens", "Twin", "twin_of"]

TWINS = {
    "float16": "storage.torch.codecs.plain:PlainTwin",
    "int8": "storage.torch.codecs.int8:Int8Twin",
    "rotated": "storage.torch.codecs.rotated:RotatedTwin",
}


def twin_of(codec: Codec, *, compiled: bool = False) -> Twin[Any]:
    """The codec, for tensors; `compiled` where the model is, too."""
    kind = imported(TWINS[codec.name]) if codec.name in TWINS else HostTwin
    twin: Twin[Any] = kind(codec, compiled=compiled)
    return twin
