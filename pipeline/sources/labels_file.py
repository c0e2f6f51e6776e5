"""A folder of images, flat or not, with a file that holds the labels: `labels.csv`, or `dataset.json` as in EDM's zips.

    labels.csv     file,label            a header line, then a path below the folder and a number or a class name;
                   a.jpg,3               a third column class_name may name the numbers
    dataset.json   {"labels": [["a.jpg", 3], …]}

Samples are those that the file names, sorted by path, which is the key. --label-column names another column, or another
key. A path that leaves the folder (absolute, or with `..`) is refused, since the file may come from anybody; links
inside the folder are the user's own and are followed. One whose image is not there is a sample all the same, and fails
when it is read. Images that the file does not name are left out. Listing costs a stat a file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from pipeline.sources.data_entries import DataEntries, list_entries
from pipeline.sources.files import UNKNOWN_BYTES, File, Files, LocalFiles, Part
from pipeline.sources.labels import AS_FOUND, Label, LabelOptions, read_label
from pipeline.sources.listing import CLASS_NAMES_FILE, Listing, decode_text, is_image, make_listing
from pipeline.sources.protocol import Sample
from storage.base import boundary
from storage.base.errors import UserError
from storage.base.shown import shown

CSV_FILE, JSON_FILE = "labels.csv", "dataset.json"
FILE, LABEL, CLASS_NAME = "file", "label", "class_name"
LABELS = "labels"  # the key in dataset.json
MAX_TABLE_BYTES = 256 << 20
WHOLE_PATH_PARTS = frozenset(("", ".", ".."))


class LabelsFile:
    """Images below a folder. `location` is the path below it, and so is the key."""

    kind = "labels-file"
    expects = f"a folder of images with {CSV_FILE} ({FILE},{LABEL}) or {JSON_FILE}"

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By the file's name."""
        return entries.is_folder and any(file.path in (CSV_FILE, JSON_FILE) for file in entries.files)

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List what the file names. Raises UserError where it cannot be understood or names nothing."""
        entries = list_entries(self.data)
        files = {file.path: file for file in entries.files if file.path in (CSV_FILE, JSON_FILE)}
        if len(files) != 1:
            raise UserError(f"DATA {self.data} needs one of {CSV_FILE} and {JSON_FILE}, it has {len(files)}")
        (name,) = files
        table = _read_table(self.place, files[name], wanted)
        below, leftovers = entries.walk()
        sizes = {file.path: file.nbytes for file in chain(entries.files, *below)}
        if not table.rows and name == JSON_FILE and wanted.unlabelled:  # {"labels": null}
            table.rows.update((path, Row(None)) for path in sizes if is_image(path))
        if not table.rows:
            raise UserError(
                f"{table.where} names no image; label some, or pass --unlabelled to store images without (−1)"
            )
        paths = sorted(table.rows)
        sizes |= self._sizes_of_unseen([path for path in paths if path not in sizes])
        absent = [path for path in paths if path not in sizes]
        if len(absent) == len(paths):
            raise UserError(
                f"none of the {len(paths)} images that {table.where} names is there, such as {shown(absent[0])}; paths "
                "are relative to the folder that holds it"
            )
        known = {*paths, name, CLASS_NAMES_FILE}
        return make_listing(
            keys=paths,
            labels=[table.rows[path].label for path in paths],
            class_names={**table.class_names, **entries.class_names()},
            locations=paths,
            nbytes=[sizes.get(path, UNKNOWN_BYTES) for path in paths],
            data_bytes=sum(max(0, sizes.get(path, 0)) for path in paths),
            left_out=sorted(path for path in [*sizes, *entries.leftovers, *leftovers] if path not in known),
            warnings=[f"{len(absent)} images of {name} are not there, such as {shown(absent[0])}"] if absent else [],
            wanted=wanted,
            looked_in=f"{table.where}, {table.column}, is empty throughout",
            where=lambda row: table.rows[paths[row]].where(table.where, paths[row]),
        )

    def _sizes_of_unseen(self, paths: Sequence[str]) -> dict[str, int]:
        """Of files whose names begin with a dot. Raises UserError for folders, and pipes, on which a reader waits."""
        sizes = {}
        for path in paths if isinstance(self.place, LocalFiles) else ():
            try:
                status = os.stat(os.path.join(self.place.root, path))
            except OSError:
                continue
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"DATA {self.data}: '{shown(path)}' is named as an image and is no file; mend it")
            sizes[path] = status.st_size
        return sizes

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The files' bytes."""
        return self.place.read_many([Part(location) for location in locations])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}


class Row(NamedTuple):
    """A label as it is spelled, and the line that it stands in (0: a file without lines)."""

    label: Label
    line: int = 0

    def where(self, table: str, path: str) -> str:
        """The row in a message."""
        return f"{table}, line {self.line}" if self.line else f"{table}, {shown(path)}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a file of labels says: a row a path, names of numbers, and where it says so."""

    where: str
    column: str
    rows: dict[str, Row]
    class_names: dict[Label, str]


def _read_table(place: Files, file: File, wanted: LabelOptions) -> Table:
    where = shown(f"{place.root}/{file.path}")
    if file.nbytes > MAX_TABLE_BYTES:
        raise UserError(f"{where} has {file.nbytes:,} bytes, too many for a file of labels")
    with place.open(file.path) as handle:
        content = handle.read(max(0, file.nbytes) + 1)  # a limit, of which memory is taken at once
    if file.path == CSV_FILE:
        return parse_csv(content, where, wanted)
    labelled = parse_json(content, where, wanted)
    rows = {clean_path(path, where): Row(label) for path, label in labelled.items()}
    if len(rows) < len(labelled):
        raise UserError(f"{where} names an image twice, by two spellings of its path; mend it")
    return Table(where=where, column=f"key {wanted.column or LABELS!r}", rows=rows, class_names={})


def clean_path(path: str, where: str) -> str:
    """The path below the folder, `./` and doubled slashes removed. Raises UserError for one that leaves the folder."""
    clean = posixpath.normpath(path) if path else ""
    if path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/") or path[1:3] in (":\\", ":/"):
        raise UserError(f"{where}: '{shown(path)}' leads out of the folder; paths are relative to it and without ..")
    if clean in WHOLE_PATH_PARTS or any(ord(character) < 32 for character in path):
        raise UserError(f"{where}: '{shown(path)}' is no path of a file; mend it")
    return clean


def parse_csv(content: bytes, where: str, wanted: LabelOptions = AS_FOUND) -> Table:
    """The rows of `labels.csv`, and label → class name where there is such a column. Raises UserError."""
    column = wanted.column or LABEL
    text = decode_text(content, where).lstrip("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    rows: dict[str, Row] = {}
    class_names: dict[Label, str] = {}
    try:
        header = [name.strip() for name in next(reader, [])]
        needed = {FILE} if wanted.unlabelled else {FILE, column}
        if not needed <= set(header):
            fix = f"call the column of paths {FILE!r}, and separate columns by commas"
            raise UserError(
                f"{where} must begin with a header line that has {' and '.join(sorted(needed))}, got "
                f"{shown(repr(header))[:200]}; {fix if FILE not in header else 'name another column by --label-column'}"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{where} has two columns of one name, {shown(repr(header))[:200]}; rename one")
        for fields in reader:
            at = f"{where}, line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue  # a blank line
            if len(fields) > len(header):
                raise UserError(
                    f"{at}: {len(fields)} fields where the header has {len(header)}; quote what has a comma in it"
                )
            row = dict(zip(header, fields, strict=False))
            if not row[FILE].strip():
                raise UserError(f"{at}: no {FILE}")
            path, label = clean_path(row[FILE], at), row.get(column)
            if path in rows:
                raise UserError(f"{at}: {shown(path)} comes a second time")
            rows[path] = Row(label, reader.line_num)
            if not wanted.unlabelled and (name := row.get(CLASS_NAME, "").strip()):
                number = _number(label, at)
                if class_names.setdefault(number, name) != name:
                    raise UserError(f"{at}: label {number} has two names")
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}; a quoted field may not be closed") from None
    return Table(where=where, column=f"column {column!r}", rows=rows, class_names=class_names)


def _number(label: Any, at: str) -> int | float:
    number = read_label(label)
    if not isinstance(number, int | float):
        raise UserError(f"{at}: {CLASS_NAME} names numbers, not {shown(repr(label))[:80]}")
    return number


def parse_json(content: bytes, where: str, wanted: LabelOptions = AS_FOUND) -> dict[str, Label]:
    """Path → label of EDM's `dataset.json`; empty when its labels are null. Raises UserError."""
    key = wanted.column or LABELS
    fix = f'it must be {{"{shown(key)}": [["a.png", 3], …]}}'
    listed = boundary.parse_json(dict[str, Any], content, where, fix)
    if content.count(json.dumps(key).encode()) > 1 and _times(content, key) > 1:
        raise UserError(f"{shown(where)} has the key {key!r} twice, and the labels of one would be lost; mend it")
    if key not in listed:
        raise UserError(f"{shown(where)} has no key {key!r}, it has {shown(', '.join(listed))[:200]}; {fix}")
    kind: Any = list[tuple[str, bool | int | float | str | None]] | None
    pairs: list[tuple[str, Label]] = boundary.checked(kind, listed[key], where, fix) or []
    labelled: dict[str, Label] = {}
    for path, label in pairs:
        if path in labelled:
            raise UserError(f"{shown(where)}: {shown(path)} comes a second time")
        labelled[path] = label
    return labelled


def _times(content: bytes, key: str) -> int:
    """How many times a key stands in one object of JSON, of which a dict keeps the last."""
    most = 0

    def count(pairs: list[tuple[str, Any]]) -> None:
        nonlocal most
        most = max(most, sum(name == key for name, _ in pairs))

    json.loads(content, object_pairs_hook=count)
    return most
