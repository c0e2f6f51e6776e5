"""Where images come from: the kinds of sources, and which of them a path or URL holds."""

from __future__ import annotations

from typing import Any

from pipeline.sources.data_entries import SHOWN, DataEntries, list_entries
from pipeline.sources.flat_folder import FlatFolder
from pipeline.sources.hdf5 import HDF5
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.labels import LabelOptions
from pipeline.sources.labels_file import LabelsFile
from pipeline.sources.listing import Listing
from pipeline.sources.parquet import Parquet
from pipeline.sources.protocol import Sample, Source, Unreadable
from pipeline.sources.tar import ClassTars, TarOfTars
from pipeline.sources.tar_members import first_names
from pipeline.sources.webdataset import WebDataset
from pipeline.sources.zip import Zip
from storage.base.errors import UserError
from storage.base.shown import shown

__all__ = ["KINDS", "LabelOptions", "Listing", "Sample", "Source", "Unreadable", "open_source"]

AUTO = "auto"
SOURCES: list[Any] = [ImageFolder, TarOfTars, ClassTars, Parquet, WebDataset, HDF5, Zip, LabelsFile, FlatFolder]
KINDS = [AUTO, *(source.kind for source in SOURCES)]


def open_source(data: str, kind: str = AUTO) -> Source:
    """The source at an absolute path, pattern or URL, of the kind that is named or recognised.

    Raises UserError when there is nothing, nothing that is recognised, or more than one kind.
    """
    by_kind = {source.kind: source for source in SOURCES}
    if kind not in (AUTO, *by_kind):
        raise UserError(f"--source must be one of {', '.join([AUTO, *by_kind])}, got {kind!r}")
    entries = list_entries(data)
    if kind != AUTO:
        source = by_kind[kind](entries)
        source.named = True
        return source
    recognised = [source for source in SOURCES if source.recognises(entries)]
    if len(recognised) > 1:
        kinds = " or ".join(source.kind for source in recognised)
        raise UserError(f"DATA {data} holds {entries.summary()}: is it {kinds}? Say which with --source")
    if not recognised:
        expected = "; ".join(f"{source.kind}: {source.expects}" for source in SOURCES)
        raise UserError(f"DATA {data} holds {entries.summary()}{_inside(entries)}, expected one of these: {expected}")
    return recognised[0](entries)


def _inside(entries: DataEntries) -> str:
    """What the first tar begins with, for a message."""
    tars = entries.having(".tar")
    names = first_names(entries.place, tars[0].path)[:SHOWN] if tars else []
    return f" ({shown(tars[0].path)} begins with {shown(', '.join(names))})" if names else ""
