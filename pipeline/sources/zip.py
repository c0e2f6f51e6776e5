"""A zip of images: folders in a zip, or, as the EDM2 tools write it, with `dataset.json` that holds the labels.

    00000/img00000000.png   00000/img00000001.png   …   dataset.json  {"labels": [["00000/img00000000.png", 3], …]}

`dataset.json` may lie in a folder of the zip, below which its names then are. Without one, the folders are the classes
(`class_folders.py`), numbered in sorted order. Samples are sorted by class in that case, and by name else; the key is
the name. Listing reads the central directory; a unit reads each member by its offset, from one open file, and checks it
against the directory's CRC-32. A member is never inflated beyond the size that it declares, nor beyond a bound.
"""

from __future__ import annotations

import contextlib
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.sources.class_folders import LABEL_FILES, ancestors, class_folders, without_images
from pipeline.sources.data_entries import DataEntries, list_entries, refuse_splits
from pipeline.sources.files import File, Part
from pipeline.sources.labels import AS_FOUND, Label, LabelOptions
from pipeline.sources.labels_file import JSON_FILE, MAX_TABLE_BYTES, clean_path, parse_json
from pipeline.sources.leftovers import leftover
from pipeline.sources.listing import Listing, is_image, make_listing
from pipeline.sources.protocol import MAX_SAMPLE_BYTES, Sample, Unreadable, too_large
from storage.base.errors import UserError
from storage.base.shown import shown

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, bytes of the name, bytes of the extra field
SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
TABLE_BYTES, TABLE_BYTES_A_NAME = 1 << 20, 32  # more than labels of the members need, escaped and indented
MADE_ON_UNIX = 3  # `create_system`, whose upper attributes are the file's mode
MAX_LINK_BYTES, LINKS_FOLLOWED = 4096, 40  # as the kernel has it
SAYS_UTF8 = 1 << 11  # a flag
EXTRA_FIELD = struct.Struct("<HH")  # kind, bytes
UNICODE_PATH = 0x7075


class _Record(NamedTuple):
    """Where a member's record begins, how far the next thing is, and what its data must be; all of it in `location`.

    `unpacked_nbytes` stands in no location of older indexes: −1.
    """

    start: int
    nbytes: int
    packed_nbytes: int
    method: int
    crc: int
    unpacked_nbytes: int = -1


_Member = tuple[str, _Record | None]  # no record: a leftover, or what is no file


class Zip:
    """One zip file. `location` is `file.zip@start+bytes:packed bytes:method:crc:unpacked bytes`."""

    kind = "zip"
    expects = "a .zip with a folder a class, or with dataset.json (EDM2)"

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By suffix."""
        return bool(entries.having(".zip"))

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every image; members that are none are left out by name. Raises UserError."""
        entries = list_entries(self.data)
        zips = entries.having(".zip")
        if len(zips) != 1:
            raise UserError(f"DATA {self.data} has {len(zips)} zip files; name the one to read")
        where = f"{shown(zips[0].path)} in DATA"
        members, folders, linked, table = self._read_directory(zips[0], wanted)
        of_labels = {table.name} if table is not None else set()
        images = sorted((name, record) for name, record in members if record is not None and is_image(name))
        taken = {name for name, _ in images} | of_labels
        left_out = [*entries.left_out(zips), *(name for name, _ in members if name not in taken)]
        warnings = []
        if table is None:
            class_of = class_folders([name for name, _ in images], where)
            left_out += [name for name, _ in images if not class_of[name]]
            images = sorted((row for row in images if class_of[row[0]]), key=lambda row: (class_of[row[0]], row[0]))
            class_names = dict(enumerate(sorted({class_of[name] for name, _ in images})))
            if images:
                refuse_splits(self.data, [*class_names.values()], [name for name, _ in images])
                warnings = without_images(folders, class_of)
            numbers = {name: label for label, name in class_names.items()}
            labels: list[Label] = [numbers[class_of[name]] for name, _ in images]
        else:
            labels, class_names = [table.labels.get(name) for name, _ in images], {}
            absent = sorted(table.labels.keys() - taken)
            if absent and len(absent) == len(table.labels):
                raise UserError(
                    f"none of the {len(absent)} images that {shown(table.name)} in {where} names is there, such as "
                    f"{shown(absent[0])}; paths are relative to the folder that holds it"
                )
            if absent:
                warnings = [f"{len(absent)} images of {table.name} are not there, such as {shown(absent[0])}"]
        if not images:
            raise UserError(f"DATA {self.data} has no image in a folder; it has {len(members)} members")
        return make_listing(
            keys=[name for name, _ in images],
            labels=labels,
            class_names={**class_names, **entries.class_names()},
            locations=[f"{zips[0].path}@{_spell(record)}" for _, record in images],
            nbytes=[record.packed_nbytes for _, record in images],
            data_bytes=zips[0].nbytes,
            left_out=left_out,
            warnings=warnings,
            wanted=wanted,
            linked_folders=linked,
            looked_in="" if table is None else f"{shown(table.name or JSON_FILE)} in {where} has none",
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The members' bytes, unpacked and checked."""
        wanted = [_parse(location) for location in locations]
        fitting = [(path, r) for path, r in wanted if max(r.packed_nbytes, r.unpacked_nbytes) <= MAX_SAMPLE_BYTES]
        packed = self.place.read_many([Part(path, record.start, record.nbytes) for path, record in fitting])
        for _, record in wanted:
            declared = max(record.packed_nbytes, record.unpacked_nbytes)
            if declared > MAX_SAMPLE_BYTES:
                yield too_large(declared)
                continue
            data = next(packed)
            assert isinstance(data, bytes)
            yield _unpack(data, record)

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}

    def _read_directory(self, file: File, wanted: LabelOptions) -> _Directory:
        """Members, and the labels where a file of the zip holds them."""
        where = shown(f"{self.place.root}/{file.path}")
        try:
            with self.place.open(file.path) as handle, zipfile.ZipFile(handle) as archive:
                named = [(_name(info, where), info) for info in archive.infolist()]
                infos = [(name, info) for name, info in named if not _spelled(info).endswith("/")]
                if not infos:
                    raise UserError(f"{where} holds no file")
                samples = [(name, info) for name, info in infos if not leftover(name)]
                refused = [n for n, i in samples if i.flag_bits & ENCRYPTED or i.compress_type not in METHODS]
                if refused:
                    raise UserError(
                        f"{where}: {shown(refused[0])} is encrypted or neither stored nor deflated; repack it"
                    )
                starts = sorted({info.header_offset for info in archive.infolist()})
                ends = dict(zip(starts, [*starts[1:], archive.start_dir], strict=True))
                by_name = dict(samples)  # the last of a name, which unpacking leaves
                empty = [name for name, info in named if _spelled(info).endswith("/")]
                folders = {folder for folder in ancestors(name for name, _ in infos) | {*empty} if not leftover(folder)}
                members: list[_Member] = []
                linked: list[str] = []
                for name, info in infos:
                    target = None if leftover(name) else _followed(archive, name, info, by_name)
                    if isinstance(target, str) and target in folders:
                        linked.append(name)
                    record = None
                    if isinstance(target, zipfile.ZipInfo):
                        record = _record(target, ends[target.header_offset], where)
                    members.append((name, record))
                if wanted.unlabelled:
                    return _Directory(members, folders, linked, _Table("", {}))
                return _Directory(members, folders, linked, _read_table(archive, samples, where, wanted))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, OverflowError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where} is no whole zip file ({shown(str(error))[:200]}); fetch it again") from error


class _Directory(NamedTuple):
    """Every member that is no folder, the folders, the links to folders, and the table of labels."""

    members: list[_Member]
    folders: set[str]
    linked: list[str]
    table: _Table | None


class _Table(NamedTuple):
    """The file that holds the labels ("" for none), and the label of each member that it names."""

    name: str
    labels: dict[str, Label]


def _read_table(
    archive: zipfile.ZipFile, members: Sequence[tuple[str, zipfile.ZipInfo]], where: str, wanted: LabelOptions
) -> _Table | None:
    """The labels of the zip's `dataset.json`, wherever it lies; None without one. Raises UserError for two of them."""
    tables = [(name, info) for name, info in members if posixpath.basename(name).lower() in LABEL_FILES]
    if not tables:
        return None
    (name, info), *others = tables
    if others or posixpath.basename(name) != JSON_FILE:
        raise UserError(
            f"{where} holds {shown(', '.join(name for name, _ in tables[:3]))}; of a zip one {JSON_FILE} is read and "
            "no other file of labels; unpack it and name a folder, or repack it with one"
        )
    most = min(MAX_TABLE_BYTES, TABLE_BYTES + TABLE_BYTES_A_NAME * sum(len(name) + 1 for name, _ in members))
    if info.file_size > most:
        raise UserError(
            f"{where}: {shown(name)} declares {info.file_size:,} bytes, for the {len(members)} members of the zip at "
            f"most {most:,} are read; repack it without what it does not need"
        )
    with archive.open(info) as file:
        content = file.read(most)
    at = f"{shown(name)} in {where}"
    folder = posixpath.dirname(name)
    labelled = parse_json(content, at, wanted)
    return _Table(name, {posixpath.join(folder, clean_path(path, at)): label for path, label in labelled.items()})


def _spelled(info: zipfile.ZipInfo) -> str:
    """A member's name as its maker meant it: macOS writes UTF-8 without saying so, old tools of Windows cat\\0.png."""
    name = info.filename
    if not info.flag_bits & SAYS_UTF8 and not name.isascii():
        raw = name.encode("cp437")  # which `zipfile` took it for
        stated = _stated_name(info.extra, raw)
        with contextlib.suppress(UnicodeDecodeError):
            name = (raw if stated is None else stated).decode()
    return name if "/" in name else name.replace("\\", "/")


def _stated_name(extra: bytes, raw: bytes) -> bytes | None:
    """UTF-8 of Info-ZIP's extra field 0x7075, where it belongs to this name."""
    while len(extra) >= EXTRA_FIELD.size:
        kind, nbytes = EXTRA_FIELD.unpack_from(extra)
        body, extra = extra[EXTRA_FIELD.size :][:nbytes], extra[EXTRA_FIELD.size + nbytes :]
        if kind == UNICODE_PATH and body[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
            return body[5:]
    return None


def _followed(
    archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo, by_name: Mapping[str, zipfile.ZipInfo]
) -> zipfile.ZipInfo | str | None:
    """The file that a member is, over symbolic links as Unix stores them; what a link names that is no member; None."""
    for _ in range(LINKS_FOLLOWED):
        mode = info.external_attr >> 16 if info.create_system == MADE_ON_UNIX else 0
        if not stat.S_ISLNK(mode):
            return info if stat.S_IFMT(mode) in (0, stat.S_IFREG) else None
        if info.file_size > MAX_LINK_BYTES:
            return None
        target = archive.read(info).decode(errors="replace")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if name not in by_name:
            return name
        info = by_name[name]
    return None


def _name(info: zipfile.ZipInfo, where: str) -> str:
    """A member's name as unpacking makes it. Raises UserError for one that leads out of the folder."""
    name = _spelled(info)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise UserError(f"{where}: the member {shown(name)} leads out of the folder that it is unpacked in; repack it")
    return "/".join(parts)


def _record(info: zipfile.ZipInfo, end: int, where: str) -> _Record:
    """Raises UserError where the directory says what cannot be."""
    start, nbytes = info.header_offset, end - info.header_offset
    if start < 0 or nbytes < LOCAL_HEADER.size + info.compress_size:
        raise UserError(
            f"{where}: the record of {shown(info.filename)} does not fit between its neighbours, so the zip is "
            "damaged; fetch it again"
        )
    most = LOCAL_HEADER.size + 2 * 0xFFFF + info.compress_size  # what follows belongs to nobody
    return _Record(start, min(nbytes, most), info.compress_size, info.compress_type, info.CRC, info.file_size)


def _spell(record: _Record) -> str:
    return f"{record.start}+" + ":".join(map(str, record[1:]))


def _parse(location: str) -> tuple[str, _Record]:
    path, _, record = location.rpartition("@")
    return path, _Record(*map(int, record.replace("+", ":").split(":")))


def _unpack(data: bytes, record: _Record) -> Sample:
    signature, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack_from(data)
    start = LOCAL_HEADER.size + name_nbytes + extra_nbytes
    if signature != SIGNATURE or start + record.packed_nbytes > len(data):
        return Unreadable("damaged in its zip: no such record")
    packed = data[start : start + record.packed_nbytes]
    declared = record.unpacked_nbytes if record.unpacked_nbytes >= 0 else MAX_SAMPLE_BYTES
    try:
        unpacked = packed if record.method == zipfile.ZIP_STORED else _inflate(packed, declared)
    except zlib.error as error:
        return Unreadable(f"damaged in its zip: {error}")
    if record.unpacked_nbytes not in (-1, len(unpacked)):
        return Unreadable(f"damaged in its zip: it does not have the {declared:,} bytes that it declares")
    return unpacked if zlib.crc32(unpacked) == record.crc else Unreadable("damaged in its zip: wrong CRC-32")


def _inflate(packed: bytes, most: int) -> bytes:
    """Unpacked bytes, one more than `most` where there are more. Raises zlib.error for a stream that does not end."""
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    unpacked = stream.decompress(packed, most + 1)
    if len(unpacked) <= most and not stream.eof:
        raise zlib.error("incomplete or truncated stream")
    return unpacked
