"""An ImageFolder tree: one sub-folder a class, images below it (ImageNet's `train/n01440764/*.JPEG`).

Classes are numbered in the sorted order of their folder names, as torchvision's ImageFolder does, so that labels agree
with the public checkpoints'. Samples are sorted by class, then by path. Sorting compares code points and so does not
depend on the locale. Listing costs one directory scan and one stat a file, on several threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.sources.listing import Listing
from pipeline.sources.protocol import Sample, Unreadable
from storage.errors import UserError
from storage.index import make_index

EXTENSIONS = frozenset(".jpeg .jpg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
LISTING_THREADS = 16  # enough to hide a network file system's latency


class ImageFolder:
    """Images below `root/<class>/`, at any depth. `location` is the path below `root`, and so is the key."""

    kind = "image-folder"

    def __init__(self, data: str) -> None:
        self.root = Path(data)

    def listing(self) -> Listing:
        """List every image; files with another extension are left out by name. Raises UserError when there is none."""
        classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise UserError(f"DATA {self.root} has no sub-folder; it needs one a class, such as {self.root}/n01440764")
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            listings = list(pool.map(self._list_class, classes))
        labels = [label for label, (found, _) in enumerate(listings) for _ in found]
        paths = [path for found, _ in listings for path, _ in found]
        sizes = [size for found, _ in listings for _, size in found]
        if not paths:
            raise UserError(
                f"DATA {self.root} has {len(classes)} class folders and no image in them "
                f"(by extension: {' '.join(sorted(EXTENSIONS))})"
            )
        return Listing(
            index=make_index(paths, labels, [classes[label] for label in labels], paths, sizes),
            left_out=tuple(path for _, others in listings for path in others),
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The files' bytes; one that is gone or forbidden is unreadable."""
        for location in locations:
            try:
                yield (self.root / location).read_bytes()
            except (FileNotFoundError, PermissionError) as error:
                yield Unreadable(f"cannot be read: {error.strerror}")

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path."""
        return {"kind": self.kind, "path": str(self.root)}

    def _list_class(self, name: str) -> tuple[list[tuple[str, int]], list[str]]:
        """(path, bytes) of each image of one class, sorted, and the paths of files with another extension."""
        found: list[tuple[str, int]] = []
        others: list[str] = []
        folders = [name]
        while folders:
            folder = folders.pop()
            for entry in os.scandir(self.root / folder):
                path = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    continue  # .DS_Store and the like: hidden files are nobody's samples
                if entry.is_dir():
                    folders.append(path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    found.append((path, entry.stat().st_size))
                else:
                    others.append(path)
        return sorted(found), sorted(others)
