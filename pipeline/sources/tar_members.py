"""Members of a tar by their offsets, so that they are read without unpacking. Headers only: the scan skips the data.

What is listed is what `tar -x` would make: a hard link, and a symbolic link to another member, is a sample with the
bytes of what it names; a sparse member (GNU's format, and PAX 0.0, 0.1 and 1.0) is put together from its extents, with
zeros between. Members are in the order of the archive. An archive with links has its headers read three times, once in
all, twice more for what links name and where that lies.

Compressed tars have no offsets and are refused. A damaged header, an end that is missing and a second archive after the
first end `tarfile`'s scan without a word, which would lose samples; here they are errors. Nothing that a header
declares takes memory or time beyond what the file itself holds.
"""

from __future__ import annotations

import contextlib
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple

from pipeline.sources.class_folders import ancestors
from pipeline.sources.files import Files, Part
from pipeline.sources.leftovers import leftover
from pipeline.sources.protocol import MAX_SAMPLE_BYTES, Sample, Unreadable, too_large
from storage.base.errors import UserError
from storage.base.shown import shown

BLOCK_BYTES = 512
PEEK = 64  # members that a kind is recognised by
MAX_HEADER_BYTES = 16 << 20  # of one member, long names and PAX records included
MAX_EXTENTS = 100_000  # of a sparse member
LINKS_FOLLOWED = 40  # as the kernel does
MAX_BYTES = (1 << 63) - 1  # of a member, as file systems have it
TAIL_BYTES = 1 << 20  # after the end of an archive, looked through for another one: `tar` pads to 10 KiB

Extents = tuple[tuple[int, int], ...]  # (offset in the sample, bytes), of what is stored of a sparse member


class Member(NamedTuple):
    """A member's name, where its data begins in the file, and its size; `regular` is false for what has no bytes.

    `to_folder` is true of a symbolic link to a folder of the tar. `extents` are a sparse member's: its stored bytes are
    these, one after the other.
    """

    name: str
    start: int
    nbytes: int
    regular: bool
    extents: Extents = ()
    to_folder: bool = False

    @property
    def stored_nbytes(self) -> int:
        """Bytes in the file."""
        return sum(nbytes for _, nbytes in self.extents) if self.extents else self.nbytes


class _Link(NamedTuple):
    """A member that names another one; `hard` links cannot lead nowhere."""

    name: str
    target: str
    hard: bool


def members(files: Files, path: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Members of the tar that lies at bytes [start, end) of a file, in the order of the archive; folders are not told.

    Raises UserError where it is no tar, compressed or damaged, and where a hard link names no member.
    """
    where = shown(f"{files.root}/{path}") + (f" (the tar at byte {start})" if start else "")
    targets: dict[str, Member | _Link] | None = None
    folders: set[str] = set()
    for member in _scan(files, path, start, end, where):
        if isinstance(member, Member):
            yield member
            continue
        if targets is None:
            targets, folders = _targets(files, path, start, end, where)
        target = _follow(member, targets)
        if target is None and member.hard and not leftover(member.name):
            raise UserError(
                f"{where}: {shown(member.name)} is a second name of {shown(member.target)}, which the tar does not "
                "hold; pack both into one tar, or copies of them (tar --hard-dereference)"
            )
        if target is None:
            yield Member(member.name, 0, 0, False, to_folder=member.target in folders)
        else:
            yield target._replace(name=member.name)


def _targets(
    files: Files, path: str, start: int, end: int | None, where: str
) -> tuple[dict[str, Member | _Link], set[str]]:
    """What the links of a tar name: members, of several of one name the last, which `tar -x` leaves; and folders."""
    links = {m.name: m for m in _scan(files, path, start, end, where) if isinstance(m, _Link)}
    wanted = {link.target for link in links.values()}
    named: dict[str, Member | _Link] = {}
    folders: set[str] = set()
    for member in _scan(files, path, start, end, where):
        if member.name in wanted:
            named[member.name] = member
        folders.add(posixpath.dirname(member.name))
    return named, wanted & ancestors(f"{folder}/" for folder in folders)


def _follow(link: _Link, targets: dict[str, Member | _Link]) -> Member | None:
    """The member that a link leads to, over other links; None where it leads nowhere, out of the tar or in circles."""
    for _ in range(LINKS_FOLLOWED):
        target = targets.get(link.target)
        if not isinstance(target, _Link):
            return target if target is not None and target.regular else None
        link = target
    return None


def _scan(files: Files, path: str, start: int, end: int | None, where: str) -> Iterator[Member | _Link]:
    """Members and links, as the headers have them."""
    with files.open(path) as handle:
        if end is None:
            end = handle.seek(0, 2)
        handle.seek(start)
        headers: Any = _Headers(handle)
        try:
            archive: Any = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 - closing it would do nothing
            for info in archive:
                headers.left = MAX_HEADER_BYTES
                archive.members = []  # it keeps all it has seen, which is gigabytes with millions
                extents = _extents(info)
                stored = sum(nbytes for _, nbytes in extents) if info.sparse is not None else info.size
                stop = info.offset_data + (stored if info.isreg() else 0)
                if min(info.size, stored) < 0 or info.size > MAX_BYTES or stop > end:
                    raise tarfile.ReadError(f"{shown(info.name)} ends at byte {stop} of {end}")
                if not info.isdir():
                    yield _member(info, extents, where)
            _check_end(handle, archive.offset, end, where)
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{where} is no whole, uncompressed tar ({shown(str(error))[:200]}); fetch it again, or repack it "
                "without compression"
            ) from error


def _check_end(handle: IO[bytes], at: int, end: int, where: str) -> None:
    """Raise tarfile.ReadError and UserError where the archive does not end at byte `at`, as its empty blocks say."""
    handle.seek(at)
    tail = handle.read(max(0, min(TAIL_BYTES, end - at)))
    if not tail:
        raise UserError(
            f"{where} lacks the empty blocks that end a tar, so samples may be missing; fetch it again, or, where it "
            "is whole, append them (head -c 1024 /dev/zero)"
        )
    if tail[:BLOCK_BYTES].strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {at}, where one should be")
    rest = len(tail) - len(tail.lstrip(b"\0"))
    rest -= rest % BLOCK_BYTES
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(tail[rest : rest + BLOCK_BYTES], tarfile.ENCODING, "surrogateescape")
        raise UserError(
            f"{where} goes on after its end, at byte {at + rest}: tars that were joined, of which only the first would "
            "be read; join them with `tar -A`, or keep them as files of their own"
        )


def _member(info: tarfile.TarInfo, extents: Extents, where: str) -> Member | _Link:
    name = _inside(
        info.pax_headers.get("GNU.sparse.name", info.name), where
    )  # else it has the packing process's number
    if info.islnk():
        return _Link(name, _inside(info.linkname, where), True)
    if info.issym():
        return _Link(name, posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname)), False)
    if info.sparse is not None and not extents and info.size:  # one hole
        extents = ((0, 0),)
    return Member(name, info.offset_data, info.size if info.isreg() else 0, info.isreg(), extents)


def _inside(name: str, where: str) -> str:
    """A member's name as unpacking makes it. Raises UserError for one that leads out of the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{where}: the member {shown(name)} leads out of the folder that it is unpacked in; repack it")
    return "/".join(parts)


def _extents(info: tarfile.TarInfo) -> Extents:
    """A sparse member's, without empty ones. Raises ValueError where they overlap or leave the sample."""
    sparse: Any = info.sparse  # its stubs call it an integer
    listed = tuple((offset, nbytes) for offset, nbytes in sparse or () if nbytes)
    if len(listed) > MAX_EXTENTS:
        raise ValueError(f"{shown(info.name)} has more than {MAX_EXTENTS} extents")
    at = 0
    for offset, nbytes in listed:
        if offset < at or nbytes < 0 or offset + nbytes > info.size:
            raise ValueError(f"the extents of the sparse member {shown(info.name)} do not fit its {info.size} bytes")
        at = offset + nbytes
    return listed


class _Headers:
    """A file of which `tarfile` may read headers only, so that a size that a header declares takes no memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.left = file, MAX_HEADER_BYTES

    def read(self, nbytes: int) -> bytes:
        """As of the file. Raises ValueError beyond what is left for this member's header."""
        if not 0 <= nbytes <= self.left:
            raise ValueError(f"a header at byte {self._file.tell()} has {nbytes} bytes or more")
        self.left -= nbytes
        return self._file.read(nbytes)

    def seek(self, position: int) -> int:
        """As of the file. Raises ValueError for a position that no file has."""
        if not 0 <= position < 2**63:
            raise ValueError(f"a header leads to byte {position}")
        return self._file.seek(position)

    def tell(self) -> int:
        """As of the file."""
        return self._file.tell()


def first_names(files: Files, path: str) -> list[str]:
    """Names of the first members that are no leftovers."""
    return [m.name for m in islice((m for m in members(files, path) if not leftover(m.name)), PEEK)]


def location(path: str, member: Member) -> str:
    """Where a member's bytes are: `file.tar@offset+bytes`, and of a sparse one `+size:offset-bytes,offset-bytes`."""
    where = f"{path}@{member.start}+{member.stored_nbytes}"
    if not member.extents:
        return where
    return f"{where}+{member.nbytes}:" + ",".join(f"{offset}-{nbytes}" for offset, nbytes in member.extents)


def part(location: str) -> Part:
    """The bytes that `location` names, as they lie in the file."""
    path, _, extent = location.rpartition("@")
    start, nbytes = extent.split("+")[:2]
    return Part(path, int(start), int(nbytes))


def read_members(files: Files, locations: Sequence[str]) -> Iterator[Sample]:
    """The members' bytes; one that declares more than a sample may have is unreadable."""
    sizes = [_size(location) for location in locations]
    wanted = [part(location) for location, size in zip(locations, sizes, strict=True) if size <= MAX_SAMPLE_BYTES]
    stored = files.read_many(wanted)
    for location, size in zip(locations, sizes, strict=True):
        yield _whole(next(stored), location) if size <= MAX_SAMPLE_BYTES else too_large(size)


def _size(location: str) -> int:
    """Bytes of the sample that a location names."""
    return int(location.rpartition("@")[2].partition(":")[0].split("+")[-1])


def _whole(stored: bytes | Unreadable, location: str) -> bytes | Unreadable:
    """The sample, holes filled, of what is stored of it."""
    before, colon, listed = location.rpartition("@")[2].partition(":")
    if not colon or isinstance(stored, Unreadable):
        return stored
    whole = bytearray(int(before.split("+")[2]))
    at = 0
    for extent in listed.split(","):
        offset, nbytes = map(int, extent.split("-"))
        whole[offset : offset + nbytes] = stored[at : at + nbytes]
        at += nbytes
    return bytes(whole)
