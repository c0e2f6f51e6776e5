"""Images to describe, in one order and in batches: a folder, an `.npz` in ADM's layout, or what a store was made of.

    folder   image files at any depth, sorted by path; all of one size, unless they are to be cropped
    .npz     `arr_0` uint8 (N, H, W, 3), read through the archive a batch at a time: 50,000 at 256 px are 10 GB
    store    the originals of its rows, read from its source again and cropped to its resolution

An image that cannot be read is an error: a distance over other images than were named would be another number.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.sources.listing import EXTENSIONS
from pipeline.transforms import DecodeError, center_crop, decode_rgb
from storage import Store, UserError, open_store
from storage.feature_file import npz_names
from storage.layout import METADATA
from storage.roots import absolute, is_url

IMAGES_ARRAY = "arr_0"


@dataclass(frozen=True, kw_only=True)
class Images:
    """`n` images; `read(batch)` yields uint8 (B, H, W, 3), each once and in order. `record` says which images."""

    n: int
    record: dict[str, Any]
    read: Callable[[int], Iterator[np.ndarray]]


def open_images(where: Path | str, *, resolution: int = 0, limit: int = 0) -> Images:
    """The images at a path, or of the store at a URL, at most `limit` of them, evenly spread; 0: all.

    `resolution` is the side that they are to have: a folder's images are brought to it by the ADM centre crop, others
    must have it. 0: they are taken as they are. Raises UserError.
    """
    if limit < 0 or resolution < 0:
        raise UserError(f"--n and --resolution must not be negative, got {limit} and {resolution}")
    if is_url(str(where)):
        return _of_store(open_store(where), resolution, limit)
    where = Path(where)
    if where.is_dir() and (where / METADATA).is_file():
        return _of_store(open_store(where), resolution, limit)
    if where.is_dir():
        return _of_folder(where, resolution, limit)
    if where.is_file():
        return _of_npz(where, resolution, limit)
    raise UserError(f"{where} does not exist; name a folder of images, an .npz with {IMAGES_ARRAY}, or a store")


def _of_folder(root: Path, resolution: int, limit: int) -> Images:
    found = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
    )
    if not found:
        raise UserError(f"{root} holds no image (by extension: {' '.join(sorted(EXTENSIONS))})")
    paths = [found[i] for i in spread(len(found), limit)]
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())

    def read(batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), batch):
            part = [_decoded(path, resolution) for path in paths[start : start + batch]]
            for path, image in zip(paths[start : start + batch], part, strict=True):
                if image.shape != part[0].shape:
                    raise UserError(
                        f"{path} is {image.shape[1]}×{image.shape[0]}, an image before it {part[0].shape[1]}×"
                        f"{part[0].shape[0]}; pass --resolution to crop them all to one size"
                    )
            yield np.stack(part)

    return Images(n=len(paths), record=_record("folder", root, len(paths), digest, resolution=resolution), read=read)


def _decoded(path: Path, resolution: int) -> np.ndarray:
    try:
        image = decode_rgb(path.read_bytes())
        return center_crop(image, resolution) if resolution else np.asarray(image)
    except DecodeError as error:
        raise UserError(f"{path} cannot be read as an image ({error}); remove it or make it again") from None


def _of_npz(path: Path, resolution: int, limit: int) -> Images:
    if IMAGES_ARRAY not in npz_names(path):
        raise UserError(
            f"{path} has no {IMAGES_ARRAY}, the images of ADM's layout; it has {', '.join(npz_names(path))}"
        )
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES_ARRAY}.npy") as member:
        shape, dtype = _header(member, path)
    _require_size(path, shape[1:3], resolution)
    chosen = spread(shape[0], limit)
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size}\0{status.st_mtime_ns}\0{len(chosen)}".encode())

    def read(batch: int) -> Iterator[np.ndarray]:
        image_bytes = int(np.prod(shape[1:]))
        wanted = set(chosen.tolist())
        pending: list[np.ndarray] = []
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES_ARRAY}.npy") as member:
            _header(member, path)
            for i in range(shape[0]):
                data = member.read(image_bytes)
                if len(data) != image_bytes:
                    raise UserError(f"{path} ends within image {i} of {shape[0]}; copy it again")
                if i in wanted:
                    pending.append(np.frombuffer(data, dtype=dtype).reshape(shape[1:]))
                if len(pending) == batch:
                    yield np.stack(pending)
                    pending = []
        if pending:
            yield np.stack(pending)

    return Images(n=len(chosen), record=_record("npz", path, len(chosen), digest), read=read)


def _header(member: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in an archive, which is then at its first byte."""
    version = np.lib.format.read_magic(member)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or shape[0] == 0:
        raise UserError(f"{IMAGES_ARRAY} of {path} is {dtype} {shape}; images are uint8 (N, H, W, 3), in C order")
    return shape, dtype


def _of_store(store: Store, resolution: int, limit: int) -> Images:
    from pipeline.preview import open_originals

    _require_size(str(store.root), (store.resolution, store.resolution), resolution)
    kept = np.arange(store.n_rows)
    for path in store.groups():
        group = store.group(path)
        kept = np.setdiff1d(kept, group.failed_rows)
        group.close()
    rows = kept[spread(len(kept), limit)]
    originals = open_originals(store)
    digest = hashlib.sha256(store.index.digest().encode() + rows.tobytes())

    def read(batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), batch):
            yield originals(rows[start : start + batch])

    record = _record("store", str(store.root), len(rows), digest, resolution=store.resolution)
    return Images(n=len(rows), record=record, read=read)


def _require_size(where: Path | str, size: tuple[int, ...], resolution: int) -> None:
    if resolution and size != (resolution, resolution):
        raise UserError(
            f"{where} holds images of {size[1]}×{size[0]}, and --resolution {resolution} crops a folder's only"
        )


def spread(total: int, limit: int) -> np.ndarray:
    """At most `limit` of `total` places, evenly spread; all for 0."""
    n = min(limit, total) if limit else total
    return np.linspace(0, total - 1, n).round().astype(np.int64)


def _record(kind: str, where: Path | str, n: int, digest: Any, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "path": absolute(where), "n": n, "digest": digest.hexdigest(), **more}
