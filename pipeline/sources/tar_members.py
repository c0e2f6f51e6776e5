"""Members of a tar by their offsets, so that they are read without unpacking. Headers only: the scan skips the data.

Compressed tars have no offsets and are refused. A damaged header ends `tarfile`'s scan without a word, which would lose
the rest of the archive; here it is an error.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.sources.files import Files, Part
from storage.errors import UserError

BLOCK_BYTES = 512
PEEK = 64  # members that a kind is recognised by


@dataclass(frozen=True)
class Member:
    """A member's name, where its data begins in the file, and its size; `regular` is false for links and devices."""

    name: str
    start: int
    nbytes: int
    regular: bool


def members(files: Files, path: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Members of the tar that lies at bytes [start, end) of a file, in the order of the archive; folders are not told.

    Raises UserError where it is no tar, compressed or damaged.
    """
    where = f"{files.root}/{path}" + (f" (the tar at byte {start})" if start else "")
    with files.open(path) as handle:
        if end is None:
            end = handle.seek(0, 2)
        handle.seek(start)
        try:
            archive: Any = tarfile.open(fileobj=handle, mode="r:")  # noqa: SIM115 - closing it would do nothing
            for info in archive:
                archive.members = []  # it keeps all it has seen, which is gigabytes with millions
                stop = info.offset_data + (info.size if info.isreg() else 0)
                if stop > end:
                    raise tarfile.ReadError(f"{info.name} ends at byte {stop} of {end}")
                if not info.isdir():
                    yield Member(info.name.removeprefix("./"), info.offset_data, info.size, info.isreg())
            handle.seek(archive.offset)
            if handle.read(min(BLOCK_BYTES, end - archive.offset)).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}, where one should be")
        except tarfile.TarError as error:
            raise UserError(
                f"{where} is no whole, uncompressed tar ({error}); fetch it again, or repack it without compression"
            ) from error


def first_names(files: Files, path: str) -> list[str]:
    """Names of the first members."""
    return [member.name for member in islice(members(files, path), PEEK)]


def location(path: str, member: Member) -> str:
    """Where a member's bytes are: `file.tar@offset+bytes`."""
    return f"{path}@{member.start}+{member.nbytes}"


def part(location: str) -> Part:
    """What `location` says."""
    path, _, extent = location.rpartition("@")
    start, _, nbytes = extent.partition("+")
    return Part(path, int(start), int(nbytes))
