"""Images to describe, in one order: a folder, an `.npz` in ADM's layout, or what a store was made of.

    folder   image files at any depth, sorted by path, as a source walks it: links are followed, dot files left out;
             all of one size, unless they are to be cropped
    .npz     `arr_0` uint8 (N, H, W, 3), read through the archive one at a time: 50,000 at 256 px are 10 GB
    store    the originals of its rows, read from its source again and cropped to its resolution

An image that cannot be read is handed out as `Unreadable`; how many may be, is the caller's to say. Each has a key that
is another when the image may be another: where it lies, its size, and when it was changed.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.sources.files import LocalFiles, Part, walk
from pipeline.sources.listing import EXTENSIONS
from pipeline.sources.protocol import Unreadable
from pipeline.transforms import DecodeError, center_crop, decode_rgb
from storage import Store, UserError, open_store
from storage.base.boundary import open_regular
from storage.base.shown import shown
from storage.feature_file import held, npy_header, npz_names
from storage.layout import METADATA
from storage.roots import absolute, is_url

IMAGES_ARRAY = "arr_0"
KEY_BYTES = 16
MAX_PIXELS = 1 << 26  # of an image in an archive, whose header may name any size; no encoder takes 8,192 × 8,192
READ_AT_ONCE = 64  # originals of a store

Image = np.ndarray | Unreadable  # uint8 (H, W, 3)


@dataclass(frozen=True, kw_only=True)
class Images:
    """`read(places)` yields the images at ascending places of `names`, in order; `record` says which images they are.

    `left_out` are what operating systems and file servers leave, and links that lead back to where they are.
    """

    names: Sequence[str]
    keys: Sequence[bytes]
    record: dict[str, Any]
    read: Callable[[Sequence[int]], Iterator[Image]]
    left_out: Sequence[str] = ()


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
    if where.exists():
        return _of_npz(where, resolution, limit)
    raise UserError(f"{where} does not exist; name a folder of images, an .npz with {IMAGES_ARRAY}, or a store")


LOCK = ".lock"  # of the process that draws images into the folder, not worth a word


def _of_folder(root: Path, resolution: int, limit: int) -> Images:
    images, leftovers = _walk(root)
    if not images:
        raise UserError(f"{root} holds no image (by extension: {' '.join(sorted(EXTENSIONS))})")
    names = [images[i] for i in spread(len(images), limit)]

    def read(places: Sequence[int]) -> Iterator[Image]:
        samples = LocalFiles(str(root)).read_many([Part(names[place]) for place in places])
        for sample in samples:
            yield sample if isinstance(sample, Unreadable) else _decoded(sample, resolution)

    keys = [_key(name, resolution, *_changed(root / name)) for name in names]
    record = _record("folder", root, resolution=resolution)
    return Images(names=names, keys=keys, record=record, read=read, left_out=leftovers)


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Paths of the image files at any depth, sorted, and what is nobody's image: leftovers, links in circles."""
    files, leftovers = walk(LocalFiles(str(root)), "")
    images = [file.path for file in files if os.path.splitext(file.path)[1].lower() in EXTENSIONS]
    return images, [path for path in leftovers if path != LOCK]


def _changed(path: Path) -> tuple[int, ...]:
    """Size and times of a file; -1 of one that is gone. The second time cannot be set, so that none is mistaken."""
    try:
        status = path.stat()
    except OSError:
        return (-1,)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _decoded(data: bytes, resolution: int) -> Image:
    try:
        image = decode_rgb(data)
        return center_crop(image, resolution) if resolution else np.asarray(image)
    except DecodeError as error:
        return Unreadable(str(error))


def _of_npz(path: Path, resolution: int, limit: int) -> Images:
    names = npz_names(path)
    if IMAGES_ARRAY not in names:
        raise UserError(f"{path} has no {IMAGES_ARRAY}, the images of ADM's layout; it has {held(names)}")
    shape = _shape(path)
    _require_size(path, shape[1:3], resolution)
    chosen = spread(shape[0], limit).tolist()

    def read(places: Sequence[int]) -> Iterator[Image]:
        image_bytes = int(np.prod(shape[1:]))
        wanted = {chosen[place] for place in places}
        with _member(path) as member:
            npy_header(member)
            for i in range(max(wanted, default=-1) + 1):
                data = member.read(image_bytes)
                if len(data) != image_bytes:
                    raise UserError(f"{path} ends within image {i} of {shape[0]}; copy it again")
                if i in wanted:
                    yield np.frombuffer(data, dtype=np.uint8).reshape(shape[1:])

    changed = _changed(path)
    return Images(
        names=[f"image {i}" for i in chosen],
        keys=[_key(i, *changed) for i in chosen],
        record=_record("npz", path),
        read=read,
    )


def _member(path: Path) -> Any:
    """The images' array in an archive, opened. Raises UserError."""
    try:
        return zipfile.ZipFile(os.fdopen(open_regular(path), "rb")).open(f"{IMAGES_ARRAY}.npy")
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, KeyError) as error:
        raise UserError(f"{path} is not an .npz file ({shown(str(error))}); restore it or make it again") from None


def _shape(path: Path) -> tuple[int, ...]:
    with _member(path) as member:
        try:
            shape, dtype, fortran = npy_header(member)
        except ValueError as error:
            raise UserError(f"{IMAGES_ARRAY} of {path} cannot be read ({shown(str(error))[:120]})") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        raise UserError(f"{IMAGES_ARRAY} of {path} is {dtype} {shape}; images are uint8 (N, H, W, 3), in C order")
    if shape[1] * shape[2] > MAX_PIXELS or shape[0] > 2**31:
        raise UserError(f"{IMAGES_ARRAY} of {path} is said to be {shape[0]} images of {shape[2]}×{shape[1]}, too large")
    return shape


def _of_store(store: Store, resolution: int, limit: int) -> Images:
    from pipeline.preview import read_originals

    _require_size(str(store.root), (store.resolution, store.resolution), resolution)
    kept = np.arange(store.n_rows)
    for path in store.groups():
        group = store.group(path)
        kept = np.setdiff1d(kept, group.failed_rows)
        group.close()
    if not len(kept):
        raise UserError(f"{store.root} holds no image: all {store.n_rows} failed to decode")
    rows = kept[spread(len(kept), limit)]
    originals = read_originals(store)
    index = store.index
    digest = index.digest()

    def read(places: Sequence[int]) -> Iterator[Image]:
        for start in range(0, len(places), READ_AT_ONCE):
            yield from originals(rows[list(places[start : start + READ_AT_ONCE])])

    locations = index.keys
    return Images(
        names=[locations[row] for row in rows],
        keys=[_key(digest, row, store.resolution) for row in rows.tolist()],
        record=_record("store", str(store.root), resolution=store.resolution),
        read=read,
    )


def _require_size(where: Path | str, size: tuple[int, ...], resolution: int) -> None:
    if resolution and size != (resolution, resolution):
        raise UserError(
            f"{where} holds images of {size[1]}×{size[0]}, and --resolution {resolution} crops a folder's only"
        )


def spread(total: int, limit: int) -> np.ndarray:
    """At most `limit` of `total` places, evenly spread; all for 0."""
    n = min(limit, total) if limit else total
    return np.linspace(0, total - 1, n).round().astype(np.int64)


def _key(*parts: object) -> bytes:
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def _record(kind: str, where: Path | str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "path": absolute(where), **more}
