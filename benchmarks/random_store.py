"""A store of random numbers, a row as large as ImageNet's, written through the real writer, to train on for a while.

SD-VAE's moments at 256 px (8 × 32 × 32), those of an autoencoder of factor 16 (64 × 16 × 16), and 256 patch tokens of
the widths asked for, in one codec, beside a class token. One shard's numbers are drawn and every shard holds them: what
is read is as large and as spread as real features are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage import (
    ArrayLayout,
    GroupLayout,
    Staging,
    StoreLayout,
    create_group,
    create_store,
    open_store,
    places,
    publish_unit,
)
from storage.codecs import codec_named
from storage.identity import FeaturesIdentity, Identity, LatentsIdentity
from storage.index import make_index
from storage.reader import DEFAULT_THREADS
from storage.roots import open_root

RESOLUTION = 256
GRID = 16
SHARD_ROWS = 512
N_CLASSES = 10
FEATURES = "features/random"  # of the first width
LATENTS = {"latents/random": (4, 32), "latents/random-f16": (32, 16)}  # channels, side


def features_path(width: int, widths: Sequence[int]) -> str:
    """The features group of a width."""
    return FEATURES if width == widths[0] else f"{FEATURES}-{width}"


def write(root: Path, n_rows: int, widths: Sequence[int], dtype: str) -> None:
    """A whole store of `n_rows` samples at `root`, with a group of features (256, width) of each width as `dtype`.

    It is not synced to the disk.
    """
    store = StoreLayout(
        n_rows=n_rows, views=("original",), resolution=RESOLUTION, shard_rows=min(SHARD_ROWS, n_rows)
    )  # fmt: skip
    labels = [row % N_CLASSES for row in range(n_rows)]
    keys = [f"{row:07d}" for row in range(n_rows)]
    index = make_index(keys, labels, [f"class{label}" for label in labels], keys, [0] * n_rows)
    arrays = _arrays(store.shard_rows, widths, dtype)
    with Staging(root) as staging:
        create_store(root, store, index, {"source": "random"}, staging.run_id)
        for path, identity in _identities(widths, dtype).items():
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


def count_places(root: Path, path: str) -> None:
    """The statistics that a model needs which learns this group's tokens."""
    group = open_store(root).group(path)
    with Staging(root) as staging:
        places.publish(open_root(root), group, places.count(group, DEFAULT_THREADS), staging.run_id)
    group.close()


def _arrays(n: int, widths: Sequence[int], dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """One shard's arrays (n, 1, …) by group and name."""
    rng = np.random.default_rng(0)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for path, (channels, side) in LATENTS.items():
        moments = rng.standard_normal((n, 1, 2 * channels, side, side), dtype=np.float32)
        moments[:, :, channels:] = np.abs(moments[:, :, channels:])
        arrays[path] = {"moments": moments.astype(np.float16)}
    for width in widths:
        tokens = rng.standard_normal((n, GRID * GRID, width), dtype=np.float32)
        features = {name: of[:, None] for name, of in codec_named(dtype).encode(tokens, np.arange(n), 0).items()}
        features["cls"] = rng.standard_normal((n, 1, width), dtype=np.float32).astype(np.float16)
        arrays[features_path(width, widths)] = features
    return arrays


def _identities(widths: Sequence[int], dtype: str) -> dict[str, Identity]:
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
        **{
            features_path(width, widths): FeaturesIdentity(
                resolution=RESOLUTION,
                encoder="random numbers",
                dtype=codec_named(dtype).dtype,
                token_grid=(GRID, GRID),
                width=width,
                codec=codec_named(dtype).identity,
            )
            for width in widths
        },
    }
