"""Stores of features that a run learns as latents, and settings of the models that learn them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from storage import Staging, StoreLayout, create_group, create_store, publish_unit
from storage.__main__ import main as storage_main
from storage.codecs import PLAIN, Codec
from storage.final_norm import AFFINE, ATTRIBUTE, FinalNorm
from storage.index import make_index
from tests.stores import FEATURES, encoded, make_identities, make_layouts

RIT: dict[str, Any] = {
    "data.latents": FEATURES, "model.kind": "rit", "model.patch": 1, "model.class_token": True, "model.context": 3,
    "model.context_block": 2, "loss.projection_weight": (0.0,), "loss.time_shift": 0.0, "sample.shift": 0.0,
}  # fmt: skip
DITDH: dict[str, Any] = {
    "data.latents": FEATURES, "model.kind": "ditdh", "model.patch": 1, "model.head_width": 32, "model.head_depth": 1,
    "model.head_heads": 2, "loss.projection_weight": (0.0,),
}  # fmt: skip
NORM = FinalNorm(
    weight=np.linspace(-1.5, 2.0, 24, dtype=np.float32), bias=np.linspace(-3, 3, 24, dtype=np.float32)
)  # no channel's weight is 0


def write(
    root: Path,
    tokens: np.ndarray,
    *,
    layer: str,
    codec: Codec = PLAIN,
    norm: FinalNorm | None = None,
    encoder: str = "test",
) -> None:
    """A store of features (N, V, 64, 24), whose first is the class token too, with counted statistics."""
    views = ("original", "hflip")[: tokens.shape[1]]
    store = StoreLayout(n_rows=len(tokens), views=views, resolution=128, shard_rows=16)
    layout, identity = make_layouts(store, codec=codec)[FEATURES], make_identities(codec=codec)[FEATURES]
    identity = dataclasses.replace(identity, layer=layer, encoder=encoder)  # type: ignore[call-arg]
    keys = [str(row) for row in range(len(tokens))]
    arrays = {"cls": tokens[:, :, 0].astype(np.float16), **encoded(tokens.astype(np.float32), codec)}
    with Staging(root) as staging:
        index = make_index(keys, [row % 5 for row in range(len(keys))], [""] * len(keys), keys, [0] * len(keys))
        create_store(root, store, index, {}, staging.run_id)
        more = {ATTRIBUTE: norm.packed()} if norm is not None else {}
        digest = create_group(root, layout, identity, {}, staging.run_id, more=more)
        staging.prepare(FEATURES)
        for unit in range(store.n_units):
            cut = {n: array[store.unit_rows(unit).start : store.unit_rows(unit).stop] for n, array in arrays.items()}
            publish_unit(root, layout, digest, unit, cut, [], staging.run_id, {})
    assert storage_main(["statistics", str(root), FEATURES, "--places"]) == 0


def plain_tokens(n: int = 48) -> np.ndarray:
    """Like those of a final norm without its affine part, places and channels not alike."""
    rng = np.random.default_rng(5)
    mean, deviation = rng.standard_normal((64, 24)), np.exp(0.5 * rng.standard_normal((64, 24)))
    return (mean + deviation * rng.standard_normal((n, 1, 64, 24))).astype(np.float32)


def write_affine(root: Path) -> None:
    """Features after the affine norm, as they are stored for REPA, that say what it is."""
    write(root, plain_tokens() * NORM.weight + NORM.bias, layer=AFFINE, norm=NORM)
