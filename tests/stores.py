"""Small stores of random numbers, written through the real writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from storage import (
    ArrayLayout,
    Failure,
    GroupLayout,
    Staging,
    StoreLayout,
    create_group,
    create_store,
    open_store,
    places,
    publish_unit,
)
from storage.codecs import PLAIN, Codec
from storage.identity import FeaturesIdentity, Identity, LatentsIdentity
from storage.index import make_index
from storage.receipts import look_at

LATENTS = "latents/tiny-vae"
FEATURES = "features/tiny-vit"


def make_layouts(store: StoreLayout, width: int = 24, codec: Codec | None = None) -> dict[str, GroupLayout]:
    """Latents (8, 16, 16) and features of 64 tokens on an 8×8 grid, as the built-in encoders write at 128 px."""

    def array(name: str, *row_shape: int, dtype: str = "float16") -> ArrayLayout:
        return ArrayLayout(name=name, dtype=dtype, row_shape=row_shape, store=store)

    features = [array("cls", width)]
    for name, (dtype, shape) in (codec or PLAIN).arrays(64, width).items():
        features.append(array(name, *shape, dtype=dtype))
    return {
        LATENTS: GroupLayout(path=LATENTS, arrays=(array("moments", 8, 16, 16),)),
        FEATURES: GroupLayout(path=FEATURES, arrays=tuple(features)),
    }


def make_identities(width: int = 24, codec: Codec | None = None) -> dict[str, Identity]:
    """Identities with the fields that readers use."""
    return {
        LATENTS: LatentsIdentity(
            name="tiny-vae",
            encoder="test",
            weights_sha256="0" * 64,
            resolution=128,
            dtype="float16",
            latent_scale_factor=0.5,
            latent_shift_factor=0.0,
            latent_channels=4,
            latent_size=(16, 16),
        ),
        FEATURES: FeaturesIdentity(
            name="tiny-vit",
            encoder="test",
            weights_sha256="0" * 64,
            resolution=128,
            dtype=(codec or PLAIN).dtype,
            codec=(codec or PLAIN).identity,
            layer="norm",
            token_grid=(8, 8),
            width=width,
        ),
    }


def random_arrays(layout: GroupLayout, seed: int = 0, codec: Codec | None = None) -> dict[str, np.ndarray]:
    """Standard normal numbers for every array of the group, (N, V, *row_shape); tokens encoded by a codec."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for array in layout.arrays:
        if array.name == "patches" and codec is not None:
            shape = (*array.shape[:2], *codec.tokens_shape(array.row_shape))
            arrays |= encoded(rng.standard_normal(shape).astype(np.float32), codec)
        elif codec is None or array.name not in codec.names:
            arrays[array.name] = rng.standard_normal(array.shape).astype(np.float32)
    return {array.name: arrays[array.name].astype(array.dtype) for array in layout.arrays}


def encoded(tokens: np.ndarray, codec: Codec, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Arrays (N, V, *row_shape) of tokens (N, V, T, D), of rows 0 to N − 1 unless said."""
    numbers = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    of_views = [codec.encode(tokens[:, view], numbers, view) for view in range(tokens.shape[1])]
    return {name: np.stack([arrays[name] for arrays in of_views], axis=1) for name in of_views[0]}


def decoded(arrays: Mapping[str, np.ndarray], codec: Codec, **options: Any) -> np.ndarray:
    """The other way round."""
    n, n_views = arrays["patches"].shape[:2]
    of_views = [
        codec.decode({name: arrays[name][:, view] for name in codec.names}, np.arange(n), view, **options)
        for view in range(n_views)
    ]
    return np.stack(of_views, axis=1)


def make_store(
    root: Path | str,
    *,
    n_rows: int = 40,
    n_views: int = 1,
    shard_rows: int = 16,
    n_classes: int = 5,
    failed_rows: Sequence[int] = (),
    width: int = 24,
    codec: Codec | None = None,
    features: Mapping[str, np.ndarray] | None = None,
    source: Mapping[str, str] | None = None,
    label: int | None = None,
    suffix: str = "",
    missing_only: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Write a complete store at `root`; returns the arrays by group and name (failed rows hold numbers, unwritten).

    `features` replaces random arrays of the features group; `source` says where the originals are, if anywhere; `label`
    is every row's (−1: none), and not the classes in turn; `suffix` ends every key; `missing_only` leaves the units
    alone that are done already, as the pipeline does.
    """
    store = StoreLayout(n_rows=n_rows, views=("original", "hflip")[:n_views], resolution=128, shard_rows=shard_rows)
    layouts, identities = make_layouts(store, width, codec), make_identities(width, codec)
    keys = [f"class{row % n_classes}/{row:05d}{suffix}" for row in range(n_rows)]
    labels = [row % n_classes if label is None else label for row in range(n_rows)]
    index = make_index(keys, labels, [f"class{label}" for label in labels], keys, [1000] * n_rows)
    data: dict[str, dict[str, np.ndarray]] = {}
    with Staging(root) as staging:
        create_store(root, store, index, dict(source or {"source": "random"}), staging.run_id)
        for seed, (path, layout) in enumerate(layouts.items()):
            data[path] = random_arrays(layout, seed, codec)
            if path == FEATURES and features is not None:
                data[path].update(features)
            publish_all(
                root, layout, identities[path], data[path], keys, failed_rows, staging, missing_only=missing_only
            )
    return data


def count_places(root: Path | str, path: str = FEATURES) -> None:
    """Write the statistics of a features group's places, without which it cannot be latents."""
    with Staging(root) as staging:
        group = open_store(root).group(path)
        places.publish(staging.root, group, places.count(group, 1), staging.run_id)
        group.close()


def make_groups(
    root: Path,
    resolution: int,
    groups: Mapping[str, Mapping[str, Any]],
    *,
    n_rows: int = 2,
    labels: Sequence[int] = (),
) -> None:
    """A store of random numbers with groups of any geometry: n (channels or width), side, and `arrays` if not all.

    Two classes in turn, unless `labels` says otherwise; factors and shifts of latents are those of `make_identities`.
    """
    store = StoreLayout(n_rows=n_rows, views=("original",), resolution=resolution, shard_rows=n_rows)
    keys = [f"{row:05d}" for row in range(n_rows)]
    labels = labels or [row % 2 for row in range(n_rows)]
    index = make_index(keys, labels, ["" if n < 0 else f"class{n}" for n in labels], keys, [1] * n_rows)
    with Staging(root) as staging:
        create_store(root, store, index, {"source": "none"}, staging.run_id)
        for path, of in groups.items():
            n, side = of["n"], of["side"]
            kind = LATENTS if path.startswith("latents/") else FEATURES
            identity = replace(make_identities()[kind], name=path.partition("/")[2], resolution=resolution)
            shapes: dict[str, tuple[int, ...]]
            if kind == LATENTS:
                identity = replace(identity, latent_channels=n, latent_size=(side, side))
                shapes = {"moments": (2 * n, side, side)}
            else:
                identity = replace(identity, width=n, token_grid=(side, side))
                shapes = {"patches": (side * side, n), "cls": (n,)}
            arrays = [
                ArrayLayout(name=name, dtype="float16", row_shape=shapes[name], store=store)
                for name in of.get("arrays", shapes)
            ]
            layout = GroupLayout(path=path, arrays=tuple(arrays))
            publish_all(root, layout, identity, random_arrays(layout), keys, [], staging)


def publish_all(
    root: Path | str,
    layout: GroupLayout,
    identity: Identity,
    arrays: Mapping[str, np.ndarray],
    keys: Sequence[str],
    failed_rows: Sequence[int],
    staging: Staging,
    *,
    missing_only: bool = False,
) -> None:
    """Publish every unit of a group, or those that are not done."""
    digest = create_group(root, layout, identity, {}, staging.run_id)
    staging.prepare(layout.path)
    for unit in range(layout.store.n_units):
        if missing_only and look_at(staging.root, layout, unit, digest)[1]:
            continue
        rows = layout.store.unit_rows(unit)
        failed = [Failure(row=row, key=keys[row], reason="test") for row in failed_rows if row in rows]
        cut = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
        publish_unit(root, layout, digest, unit, cut, failed, staging.run_id, {})
