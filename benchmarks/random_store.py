"""A store of random numbers, a row as large as ImageNet's, written through the real writer, to train on for a while.

SD-VAE's moments at 256 px (8 × 32 × 32), those of an autoencoder of factor 16 (64 × 16 × 16), and 256 patch tokens of
the width asked for, float16 or int8 with factors, beside a class token. One shard's numbers are drawn and every shard
holds them: what is read is as large and as spread as real features are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_group, create_store, publish_unit
from storage.codecs import codec_named
from storage.identity import FeaturesIdentity, Identity, LatentsIdentity
from storage.index import make_index

RESOLUTION = 256
GRID = 16
SHARD_ROWS = 512
N_CLASSES = 10
FEATURES = "features/random"
LATENTS = {"latents/random": (4, 32), "latents/random-f16": (32, 16)}  # channels, side


def write(root: Path, n_rows: int, width: int, dtype: str) -> None:
    """A whole store of `n_rows` samples at `root`, features (256, width) as `dtype`; not synced to the disk."""
    store = StoreLayout(
        n_rows=n_rows, views=("original",), resolution=RESOLUTION, shard_rows=min(SHARD_ROWS, n_rows)
    )  # fmt: skip
    labels = [row % N_CLASSES for row in range(n_rows)]
    keys = [f"{row:07d}" for row in range(n_rows)]
    index = make_index(keys, labels, [f"class{label}" for label in labels], keys, [0] * n_rows)
    arrays = _arrays(store.shard_rows, width, dtype)
    with Staging(root) as staging:
        create_store(root, store, index, {"source": "random"}, staging.run_id)
        for path, identity in _identities(width, dtype).items():
            layout = GroupLayout(
                path=path,
                arrays=tuple(
                    ArrayLayout(name=name, dtype=str(array.dtype), row_shape=array.shape[2:], store=store)
                    for name, array in arrays[path].items()
                ),
            )
            digest = create_group(root, layout, identity, {}, staging.run_id)
            staging.prepare(path)
            for unit in range(store.n_units):
                n = len(store.unit_rows(unit))
                cut = {name: array[:n] for name, array in arrays[path].items()}
                publish_unit(root, layout, digest, unit, cut, [], staging.run_id, {}, fsync=False)


def _arrays(n: int, width: int, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """One shard's arrays (n, 1, …) by group and name."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((n, 1, GRID * GRID, width), dtype=np.float32)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for path, (channels, side) in LATENTS.items():
        moments = rng.standard_normal((n, 1, 2 * channels, side, side), dtype=np.float32)
        moments[:, :, channels:] = np.abs(moments[:, :, channels:])
        arrays[path] = {"moments": moments.astype(np.float16)}
    encoded = codec_named(dtype).encode(tokens[:, 0], np.arange(n), 0)
    features = {name: array[:, None] for name, array in encoded.items()}
    features["cls"] = rng.standard_normal((n, 1, width), dtype=np.float32).astype(np.float16)
    return {**arrays, FEATURES: features}


def _identities(width: int, dtype: str) -> dict[str, Identity]:
    """What the trainer asks of a group."""
    return {
        **{
            path: LatentsIdentity(
                resolution=RESOLUTION,
                encoder="random numbers",
                dtype="float16",
                latent_channels=channels,
                latent_size=(side, side),
                latent_scale_factor=0.18215,
                latent_shift_factor=0.0,
            )
            for path, (channels, side) in LATENTS.items()
        },
        FEATURES: FeaturesIdentity(
            resolution=RESOLUTION,
            encoder="random numbers",
            dtype=codec_named(dtype).dtype,
            token_grid=(GRID, GRID),
            width=width,
            codec=codec_named(dtype).identity,
        ),
    }
