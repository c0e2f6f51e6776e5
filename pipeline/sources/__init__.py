"""Where images come from. A source is one file with one class that satisfies `Source`.

A source lists its samples once, in an order that depends on nothing but the data, and hands out the encoded bytes of
one sample by its location. It is pickled to decode tasks on other machines, so it holds absolute paths and no handles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.listing import Listing
from storage.errors import UserError


class Source(Protocol):
    """What the job needs of a source."""

    kind: str

    def listing(self) -> Listing:
        """Every sample, deterministically ordered. Raises UserError when there is none."""
        ...

    def read(self, location: str) -> bytes:
        """The encoded image at a location that `listing` gave. Raises OSError."""
        ...

    def provenance(self) -> dict[str, str]:
        """Which kind and which path, for the record; no number depends on it."""
        ...


def open_source(data: Path) -> Source:
    """The source for a path the user gave. Raises UserError when there is nothing there that can be read."""
    if not data.exists():
        raise UserError(f"DATA {data} does not exist; name a folder with one sub-folder of images a class")
    if not data.is_dir():
        raise UserError(f"DATA {data} is a file; name a folder with one sub-folder of images a class")
    return ImageFolder(data)
