"""Where images come from: the kinds of sources, and which of them a path or URL holds."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.listing import Listing
from pipeline.sources.protocol import Sample, Source, Unreadable
from storage.errors import UserError

__all__ = ["Listing", "Sample", "Source", "Unreadable", "open_source"]

AUTO = "auto"
SOURCES = {source.kind: source for source in (ImageFolder,)}


def open_source(data: str, kind: str = AUTO) -> Source:
    """The source at an absolute path or URL. Raises UserError when there is nothing there that can be read."""
    if kind not in (AUTO, *SOURCES):
        raise UserError(f"--source must be {AUTO} or one of {', '.join(SOURCES)}, got {kind!r}")
    if not Path(data).exists():
        raise UserError(f"DATA {data} does not exist; name a folder with one sub-folder of images a class")
    if not Path(data).is_dir():
        raise UserError(f"DATA {data} is a file; name a folder with one sub-folder of images a class")
    return ImageFolder(data)
