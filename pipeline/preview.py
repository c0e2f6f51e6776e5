"""Pictures of what a store holds, so that a person can see that it is right.

reconstruction.png   originals (above) and the same images decoded from the stored posterior means (below)
features.png         images (above) and the first three principal components of their stored patch tokens as RGB
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.decode import to_rgb
from pipeline.sources import KINDS, LabelOptions, open_source
from pipeline.sources.protocol import Sample, Unreadable
from pipeline.transforms import DecodeError, center_crop
from storage import GroupReader, Store, UserError, open_store
from storage.base.shown import shown
from storage.base.waiting import waiting
from storage.layout import GroupLayout
from storage.receipts import read_receipt
from storage.samples import sample_crc32c, stored_samples

GAP = 2  # pixels between pictures
DECODE_BATCH = 8  # images; the decoder of a large VAE would need tens of gigabytes for a long row of them


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file that was written, and what it shows."""

    path: Path
    caption: str


def write_preview(root: str, out: Path, *, n_images: int = 8, vae: str = "") -> list[Picture]:
    """Write the pictures that the store's groups allow.

    Images are spread evenly over the rows. The originals are read from the source that the store was made of; raises
    UserError when it has moved. Latents are decoded by `vae`, else by what the group names (`find_decoder`).
    """
    if n_images < 1:
        raise UserError(f"--images must be at least 1, got {n_images}")
    with waiting("opening the store"):
        store = open_store(root)
        groups = [store.group(path) for path in store.groups()]
    failed = {row for group in groups for row in group.failed_rows.tolist()}
    kept = [row for row in range(store.n_rows) if row not in failed]
    if not kept:
        raise UserError(f"{root} holds no image to show: all {store.n_rows} failed to decode")
    rows = np.array([kept[i] for i in np.linspace(0, len(kept) - 1, min(n_images, len(kept))).astype(int)])
    with waiting("reading the originals"):
        originals = open_originals(store)(rows)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for group in groups:
        kind, group_name = group.path.split("/")
        if kind == "features" and "patches" not in group.arrays:
            continue  # class tokens alone make no picture
        if kind == "latents":
            decoder = find_decoder(group, vae)
            with waiting(f"decoding {group.path}"):
                below, name = decode_means(group, rows, decoder), "reconstruction.png"
            decibels = np.mean(psnr(originals, below))
            caption = f"{group.path}: PSNR {decibels:.1f} dB over {len(rows)} images, decoded by {decoder}"
        else:
            with waiting(f"principal components of {group.path}"):
                below, name = principal_components(group, rows, store.resolution), "features.png"
            caption = f"{group.path}: principal components of the patch tokens"
        path = out / (name if len([g for g in groups if g.path.startswith(kind)]) == 1 else f"{group_name}-{name}")
        Image.fromarray(stack([originals, below])).save(path)
        written.append(Picture(path=path, caption=caption))
        group.close()
    return written


def open_originals(store: Store) -> Callable[[np.ndarray], np.ndarray]:
    """Rows (n,) → centre crops of their images, uint8 (n, R, R, 3), read from the source again. Raises UserError."""
    originals = read_originals(store)

    def read(rows: np.ndarray) -> np.ndarray:
        images = []
        for image in originals(rows):
            if isinstance(image, Unreadable):
                path = store.attributes["source"]["path"]
                raise UserError(f"an original in {path} is not what it was ({image.reason}); restore it")
            images.append(image)
        return np.stack(images)

    return read


def read_originals(store: Store) -> Callable[[np.ndarray], Iterator[np.ndarray | Unreadable]]:
    """Rows (n,) → centre crops of their images, one after another, or why there is none.

    Where they lie is listed again when one is not what its row was made of: a container that was packed again has them
    elsewhere. Raises UserError for a store that was not made of images.
    """
    recorded = store.attributes.get("source", {})
    if recorded.get("kind") not in KINDS or "path" not in recorded:
        raise UserError(f"store {store.root} was not made of images, but imported; name their folder instead")
    source = open_source(recorded["path"], recorded["kind"])
    locations, keys = store.index.locations, store.index.keys
    made_of = MadeOf(store)
    listed_again = False

    def read(rows: np.ndarray) -> Iterator[np.ndarray | Unreadable]:
        nonlocal locations, listed_again
        samples = list(source.read_many([locations[row] for row in rows]))
        if not listed_again and any(made_of.differs(row, sample) for row, sample in zip(rows, samples, strict=True)):
            listed_again = True
            index = source.listing(as_stored(store)).index
            if index.digest() == store.attributes["index_digest"]:
                locations = index.locations
                samples = list(source.read_many([locations[row] for row in rows]))
        for row, sample in zip(rows, samples, strict=True):
            if made_of.differs(row, sample):
                yield Unreadable(f"{shown(keys[row])} is another image than row {row} was made of")
                continue
            try:
                yield center_crop(to_rgb(sample), store.resolution)
            except DecodeError as error:
                yield Unreadable(str(error))

    return read


def as_stored(store: Store) -> LabelOptions:
    """How the images are listed again so that labels do not stand in the way: without any where the store has none."""
    return LabelOptions(unlabelled=True) if (store.index.labels < 0).all() else LabelOptions(partly_labelled=True)


class MadeOf:
    """Which bytes a store's rows were made of, by the receipts of its groups; 4 bytes a row of the units asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._units: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def differs(self, row: int, sample: Sample) -> bool:
        """Whether a sample is known not to be what the row was made of."""
        unit, i = divmod(int(row), self._store.layout.shard_rows)
        if unit not in self._units:
            self._units[unit] = self._look_up(unit)
        crcs, known = self._units[unit]
        return bool(known[i]) and (isinstance(sample, Unreadable) or sample_crc32c(sample) != crcs[i])

    def _look_up(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._store.layout.unit_rows(unit)
        n_rows = len(rows)
        crcs, known = np.zeros(n_rows, dtype=np.uint32), np.zeros(n_rows, dtype=bool)
        for path in self._store.groups():
            receipt = read_receipt(self._store.root, GroupLayout(path=path, arrays=()), unit)
            if receipt is not None and receipt.is_of(rows):  # one of other rows says nothing
                theirs, stored = stored_samples(receipt)
                crcs, known = np.where(stored & ~known, theirs, crcs), known | stored
        return crcs, known


def find_decoder(group: GroupReader, vae: str) -> Path:
    """The directory of `vae`, else of the decoder that the group names, else of the autoencoder that made the latents.

    The last will do for a picture, and is on the machine that encoded without a network. Raises UserError.
    """
    from pipeline.encoders.vae import find_directory

    provenance = group.attributes["provenance"]
    recorded = [provenance[name] for name in ("decoder", "weights") if name in provenance]
    names = [vae] if vae else list(dict.fromkeys(recorded))
    for name in names:
        with contextlib.suppress(UserError):
            return find_directory(name, None)
    raise UserError(
        f"{group.path}: no VAE to decode with at {' or '.join(names) or 'any place it names'}; pass --vae with a "
        "diffusers directory"
    )


def decode_means(group: GroupReader, rows: np.ndarray, decoder: Path) -> np.ndarray:
    """Stored posterior means through the decoder of an autoencoder's directory, uint8 (n, R, R, 3)."""
    import torch

    from pipeline.encoders.vae import VAE

    group.require("latent_channels", arrays=["moments"])
    means = group.gather(rows, 0, ["moments"])["moments"][:, : group.identity.latent_channels]
    vae = VAE(decoder, torch.device("cpu"))
    return np.concatenate([vae.decode(means[i : i + DECODE_BATCH]) for i in range(0, len(means), DECODE_BATCH)])


def principal_components(group: GroupReader, rows: np.ndarray, resolution: int) -> np.ndarray:
    """First three principal components over all patch tokens of the rows, each stretched to 0–255; (n, R, R, 3).

    Raises UserError for tokens that are not finite, StoreError for a group without patch tokens.
    """
    group.require("token_grid")
    tokens = group.tokens(rows)
    if not np.isfinite(tokens).all():
        raise UserError(f"{group.path} holds NaN or infinity; `python -m storage verify --deep` names the rows")
    n, _, width = tokens.shape
    centred = tokens.reshape(-1, width) - tokens.reshape(-1, width).mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ axes[:3].T
    low, high = np.percentile(projected, [1, 99], axis=0)
    colours = (np.clip((projected - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    pictures = colours.reshape(n, *group.identity.token_grid, 3)
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.NEAREST)) for p in pictures])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of uint8 images (n, H, W, 3): 10 · log10(255² / mean squared error)."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def stack(strips: list[np.ndarray]) -> np.ndarray:
    """Strips (n, R, R, 3) one below the other, with white gaps."""
    n, side = strips[0].shape[:2]
    canvas = np.full((len(strips) * (side + GAP) - GAP, n * (side + GAP) - GAP, 3), 255, dtype=np.uint8)
    for row, strip in enumerate(strips):
        for column, image in enumerate(strip):
            top, left = row * (side + GAP), column * (side + GAP)
            canvas[top : top + side, left : left + side] = image
    return canvas
