"""A zip of images: folders in a zip, or, as the EDM2 tools write it, with `dataset.json` that holds the labels.

    00000/img00000000.png   00000/img00000001.png   …   dataset.json  {"labels": [["00000/img00000000.png", 3], …]}

Without `dataset.json` the first folder of a name is its class, numbered in sorted order. Samples are sorted by class in
that case, and by name else; the key is the name. Listing reads the central directory; a unit reads each member by its
offset, from one open file, and checks it against the directory's CRC-32.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.sources.files import File, Part
from pipeline.sources.found import Found, look, refuse_splits
from pipeline.sources.labels import AS_FOUND, Label, LabelOptions
from pipeline.sources.labels_file import JSON_FILE, parse_json
from pipeline.sources.listing import Listing, is_image, make_listing
from pipeline.sources.protocol import Sample, Unreadable
from storage.errors import UserError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, bytes of the name, bytes of the extra field
SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _Record(NamedTuple):
    """Where a member's record begins, how far the next thing is, and what its data must be; all of it in `location`."""

    start: int
    nbytes: int
    packed_nbytes: int
    method: int
    crc: int


class Zip:
    """One zip file. `location` is `file.zip@start+bytes:packed bytes:method:crc`."""

    kind = "zip"
    expects = "a .zip with a folder a class, or with dataset.json (EDM2)"

    def __init__(self, found: Found) -> None:
        self.data, self.place = found.data, found.place

    @staticmethod
    def recognises(found: Found) -> bool:
        """By suffix."""
        return bool(found.having(".zip"))

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every image; members that are none are left out by name. Raises UserError."""
        found = look(self.data)
        zips = found.having(".zip")
        if len(zips) != 1:
            raise UserError(f"DATA {self.data} has {len(zips)} zip files; name the one to read")
        members, labelled = self._read_directory(zips[0], wanted)
        images = sorted((name, record) for name, record in members if is_image(name))
        left_out = [*found.left_out(zips), *(name for name, _ in members if not is_image(name) and name != JSON_FILE)]
        if labelled is None:
            class_of = _class_folders([name for name, _ in images])
            left_out += [name for name, _ in images if not class_of[name]]
            images = sorted((row for row in images if class_of[row[0]]), key=lambda row: (class_of[row[0]], row[0]))
            class_names = dict(enumerate(sorted({class_of[name] for name, _ in images})))
            if images:
                refuse_splits(self.data, [*class_names.values()], [name for name, _ in images])
            numbers = {name: label for label, name in class_names.items()}
            labels: list[Label] = [numbers[class_of[name]] for name, _ in images]
        else:
            labels, class_names = [labelled.get(name) for name, _ in images], {}
        if not images:
            raise UserError(f"DATA {self.data} has no image in a folder; it has {len(members)} members")
        return make_listing(
            keys=[name for name, _ in images],
            labels=labels,
            class_names={**class_names, **found.class_names()},
            locations=[f"{zips[0].path}@{_spell(record)}" for _, record in images],
            nbytes=[record.packed_nbytes for _, record in images],
            data_bytes=zips[0].nbytes,
            left_out=left_out,
            wanted=wanted,
            looked_in="" if labelled is None else f"{JSON_FILE} in {zips[0].path} has none",
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The members' bytes, unpacked and checked."""
        wanted = [_parse(location) for location in locations]
        parts = [Part(path, record.start, record.nbytes) for path, record in wanted]
        for (_, record), data in zip(wanted, self.place.read_many(parts), strict=True):
            assert isinstance(data, bytes)
            yield _unpack(data, record)

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}

    def _read_directory(
        self, file: File, wanted: LabelOptions
    ) -> tuple[list[tuple[str, _Record]], dict[str, Label] | None]:
        """Name and record of each member that is no folder, and the labels where there is a `dataset.json`."""
        where = f"{self.place.root}/{file.path}"
        try:
            with self.place.open(file.path) as handle, zipfile.ZipFile(handle) as archive:
                infos = archive.infolist()
                starts = sorted(info.header_offset for info in infos)
                ends = dict(zip(starts, [*starts[1:], archive.start_dir], strict=True))
                refused = [i.filename for i in infos if i.flag_bits & ENCRYPTED or i.compress_type not in METHODS]
                if refused:
                    raise UserError(f"{where}: {refused[0]} is encrypted or neither stored nor deflated; repack it")
                members = [
                    (
                        info.filename,
                        _Record(
                            info.header_offset,
                            ends[info.header_offset] - info.header_offset,
                            info.compress_size,
                            info.compress_type,
                            info.CRC,
                        ),
                    )
                    for info in infos
                    if not info.is_dir()
                ]
                labelled: dict[str, Label] | None = {} if wanted.unlabelled else None
                if not wanted.unlabelled and any(name == JSON_FILE for name, _ in members):
                    labelled = parse_json(archive.read(JSON_FILE), f"{JSON_FILE} in {where}", wanted)
                return members, labelled
        except zipfile.BadZipFile as error:
            raise UserError(f"{where} is no whole zip file ({error}); fetch it again") from error


def _class_folders(names: Sequence[str]) -> dict[str, str]:
    """The class of each name: its first folder that not all names share; empty for a name without a folder."""
    folders = [name.split("/")[:-1] for name in names]
    depth = 0
    while len({tuple(parts[: depth + 1]) for parts in folders}) == 1 and min(map(len, folders)) > depth + 1:
        depth += 1
    return {name: "".join(parts[depth : depth + 1]) for name, parts in zip(names, folders, strict=True)}


def _spell(record: _Record) -> str:
    return f"{record.start}+{record.nbytes}:{record.packed_nbytes}:{record.method}:{record.crc}"


def _parse(location: str) -> tuple[str, _Record]:
    path, _, record = location.rpartition("@")
    return path, _Record(*map(int, record.replace("+", ":").split(":")))


def _unpack(data: bytes, record: _Record) -> Sample:
    signature, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack_from(data)
    start = LOCAL_HEADER.size + name_nbytes + extra_nbytes
    if signature != SIGNATURE or start + record.packed_nbytes > len(data):
        return Unreadable("damaged in its zip: no such record")
    packed = data[start : start + record.packed_nbytes]
    try:
        unpacked = packed if record.method == zipfile.ZIP_STORED else zlib.decompress(packed, wbits=-zlib.MAX_WBITS)
    except zlib.error as error:
        return Unreadable(f"damaged in its zip: {error}")
    return unpacked if zlib.crc32(unpacked) == record.crc else Unreadable("damaged in its zip: wrong CRC-32")
