"""Pictures of what a store holds, so that a person can see that it is right.

reconstruction.png   originals (above) and the same images decoded from the stored posterior means (below)
features.png         images (above) and the first three principal components of their stored patch tokens as RGB
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.sources import open_source
from pipeline.transforms import center_crop, decode_rgb
from storage import GroupReader, Store, UserError, open_store
from storage.codec import codec_of, decode

GAP = 2  # pixels between pictures


def write_preview(root: str, out: Path, *, n_images: int = 8) -> list[Path]:
    """Write the pictures that the store's groups allow and return their paths.

    Images are spread evenly over the rows. The originals are read from the source that the store was made of; raises
    UserError when it has moved.
    """
    if n_images < 1:
        raise UserError(f"--images must be at least 1, got {n_images}")
    store = open_store(root)
    groups = [store.group(path) for path in store.groups()]
    failed = {row for group in groups for row in group.failed_rows.tolist()}
    kept = [row for row in range(store.n_rows) if row not in failed]
    rows = np.array([kept[i] for i in np.linspace(0, len(kept) - 1, min(n_images, len(kept))).astype(int)])
    originals = read_originals(store, rows)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for group in groups:
        kind = group.path.split("/")[0]
        if kind == "latents":
            below, name = decode_means(group, rows), "reconstruction.png"
        else:
            below, name = principal_components(group, rows, store.resolution), "features.png"
        path = out / (
            name if len([g for g in groups if g.path.startswith(kind)]) == 1 else f"{group.identity['name']}-{name}"
        )
        Image.fromarray(stack([originals, below])).save(path)
        written.append(path)
        group.close()
    return written


def read_originals(store: Store, rows: np.ndarray) -> np.ndarray:
    """The centre crops of the rows' images, uint8 (n, R, R, 3), read from the source again."""
    source = open_source(Path(store.attributes["source"]["path"]))
    locations = store.index.locations
    return np.stack([center_crop(decode_rgb(source.read(locations[row])), store.resolution) for row in rows])


def decode_means(group: GroupReader, rows: np.ndarray) -> np.ndarray:
    """Stored posterior means through the decoder that the group names, uint8 (n, R, R, 3)."""
    import torch

    from pipeline.encoders.vae import VAE, find_directory

    moments = gather(group["moments"], rows)
    vae = VAE(find_directory(group.attributes["provenance"]["decoder"], None), torch.device("cpu"))
    return vae.decode(moments[:, : group.identity["latent_channels"]])


def principal_components(group: GroupReader, rows: np.ndarray, resolution: int) -> np.ndarray:
    """First three principal components over all patch tokens of the rows, each stretched to 0–255; (n, R, R, 3)."""
    tokens = gather_features(group, rows)
    n, _, width = tokens.shape
    centred = tokens.reshape(-1, width) - tokens.reshape(-1, width).mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ axes[:3].T
    low, high = np.percentile(projected, [1, 99], axis=0)
    colours = (np.clip((projected - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    pictures = colours.reshape(n, *group.identity["token_grid"], 3)
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.NEAREST)) for p in pictures])


def gather(reader: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of the first view, (n, *row_shape)."""
    out = np.empty((len(rows), *reader.row_shape), dtype=reader.dtype)
    reader.read_into(rows, 0, out)
    return out


def gather_features(group: GroupReader, rows: np.ndarray) -> np.ndarray:
    """Patch tokens of the first view, float32 (n, T, D), quantised or not."""
    patches = gather(group["patches"], rows)
    codec = codec_of(group.identity)
    return patches.astype(np.float32) if codec is None else decode(patches, gather(group["scale"], rows), codec)


def stack(strips: list[np.ndarray]) -> np.ndarray:
    """Strips (n, R, R, 3) one below the other, with white gaps."""
    n, side = strips[0].shape[:2]
    canvas = np.full((len(strips) * (side + GAP) - GAP, n * (side + GAP) - GAP, 3), 255, dtype=np.uint8)
    for row, strip in enumerate(strips):
        for column, image in enumerate(strip):
            top, left = row * (side + GAP), column * (side + GAP)
            canvas[top : top + side, left : left + side] = image
    return canvas
