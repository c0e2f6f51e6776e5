"""How patch tokens are stored: one file a codec, chosen for a group when it is made (`--features-dtype`).

`CODECS` is the only place that names them all. A reader asks a group for its tokens (`GroupReader.tokens`), or decodes
the arrays that it has gathered (`decoded`), and needs not know which codec it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike

from storage.base.boundary import parse_json
from storage.base.errors import StoreError
from storage.base.options import one_of
from storage.codecs.codec import TOKENS, Codec, StoredArray
from storage.codecs.int8 import INT8
from storage.codecs.plain import Plain
from storage.codecs.rotated import ROTATED
from storage.identity import FeaturesIdentity, Identity
from storage.visits import Views

__all__ = ["CODECS", "PLAIN", "TOKENS", "Codec", "StoredArray", "codec_named", "codec_of", "decoded", "stored_arrays"]

PLAIN = Plain()
CODECS: dict[str, Codec] = {
    codec.spelling: codec
    for codec in (
        PLAIN,
        INT8,
        *ROTATED,
    )
}


def codec_named(spelling: str) -> Codec:
    """The codec of `--features-dtype`. Raises UserError, which names what there is."""
    one_of("--features-dtype", spelling, CODECS)
    return CODECS[spelling]


def codec_of(identity: Identity, where: str = "the group") -> Codec:
    """The codec that a group's identity names, plain where it names none.

    Raises StoreError for one unknown, naming the group by `where`.
    """
    named = identity.codec
    if named is None:
        return PLAIN
    for codec in CODECS.values():
        if codec.identity is not None and codec.identity.keys() == named.keys() and codec.name == named["name"]:
            return parse_json(type(codec), json.dumps(named), f"the codec of {where}", "use another copy of the store")
    raise StoreError(
        f"the features of {where} are in a codec that this code does not know, {_short(named)}; use the code that "
        "wrote them"
    )


def stored_arrays(identity: Identity) -> dict[str, StoredArray]:
    """Array name → dtype and row shape of a group of this identity, whose numbers are float16 where no codec is.

    Raises UserError for tokens that the codec cannot take, StoreError for a codec that is not known.
    """
    shapes = identity.row_shapes()
    if isinstance(identity, FeaturesIdentity):
        shapes.pop({"patch": "cls", "cls": TOKENS}.get(identity.tokens or "", ""), None)
    arrays = {name: StoredArray("float16", shape) for name, shape in shapes.items()}
    if TOKENS in shapes:
        n_tokens, channels = shapes[TOKENS]
        arrays |= codec_of(identity).arrays(n_tokens, channels)
    return arrays


def decoded(
    codec: Codec, arrays: Mapping[str, np.ndarray], rows: np.ndarray, views: Views, *, dtype: DTypeLike | None = None
) -> dict[str, np.ndarray]:
    """Arrays of a group (B, *row_shape) with the codec's replaced by `patches` as numbers (B, T, D).

    `dtype` is the numbers'; as the codec hands them out unless said. Arrays that are not the codec's stay as they are.
    """
    if TOKENS not in arrays:
        return dict(arrays)
    if dtype is None:
        dtype = codec.number_dtype(arrays[TOKENS].dtype)
    numbers = codec.decode(arrays, rows, views, dtype=dtype)
    kept = [name for name in arrays if name == TOKENS or name not in codec.names]
    return {name: numbers if name == TOKENS else arrays[name] for name in kept}


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
