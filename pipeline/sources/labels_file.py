"""A folder of images, flat or not, with a file that holds the labels: `labels.csv`, or `dataset.json` as in EDM's zips.

    labels.csv     file,label            a header line, then a path below the folder and an integer or a class name;
                   a.jpg,3               a third column class_name may name the integers
    dataset.json   {"labels": [["a.jpg", 3], …]}

Samples are those that the file names, sorted by path, which is the key. One whose image is not there is a sample all
the same, and fails when it is read. Images that the file does not name are left out. Listing costs a stat a file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import chain

from pipeline.sources.files import UNKNOWN_BYTES, Part
from pipeline.sources.found import Found, look
from pipeline.sources.listing import Label, Listing, make_listing, number_labels
from pipeline.sources.protocol import Sample
from storage.errors import UserError

CSV_FILE, JSON_FILE = "labels.csv", "dataset.json"
FILE, LABEL, CLASS_NAME = "file", "label", "class_name"


class LabelsFile:
    """Images below a folder. `location` is the path below it, and so is the key."""

    kind = "labels-file"
    expects = f"a folder of images with {CSV_FILE} ({FILE},{LABEL}) or {JSON_FILE}"

    def __init__(self, found: Found) -> None:
        self.data, self.place = found.data, found.place

    @staticmethod
    def recognises(found: Found) -> bool:
        """By the file's name."""
        return found.is_folder and any(file.path in (CSV_FILE, JSON_FILE) for file in found.files)

    def listing(self) -> Listing:
        """List what the file names. Raises UserError where it cannot be understood or names nothing."""
        found = look(self.data)
        named = [name for name in (CSV_FILE, JSON_FILE) if name in {file.path for file in found.files}]
        if len(named) != 1:
            raise UserError(f"DATA {self.data} needs one of {CSV_FILE} and {JSON_FILE}, it has {len(named)}")
        with self.place.open(named[0]) as file:
            content = file.read()
        where = f"{self.data}/{named[0]}"
        class_names: dict[int, str] = {}
        if named[0] == CSV_FILE:
            labelled, class_names = parse_csv(content, where)
        else:
            labelled = parse_json(content, where)
        if not labelled:
            raise UserError(f"{where} names no image")
        sizes = {file.path: file.nbytes for file in chain(found.files, *found.walk())}
        paths = sorted(labelled)
        absent = [path for path in paths if path not in sizes]
        labels, names = number_labels([labelled[path] for path in paths])
        return make_listing(
            keys=paths,
            labels=labels,
            class_names={**names, **class_names, **found.class_names()},
            locations=paths,
            nbytes=[sizes.get(path, UNKNOWN_BYTES) for path in paths],
            data_bytes=sum(max(0, sizes.get(path, 0)) for path in paths),
            left_out=sorted(path for path in sizes if path not in labelled and path not in (named[0], "classes.txt")),
            warnings=[f"{len(absent)} images of {named[0]} are not there, such as {absent[0]}"] if absent else [],
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The files' bytes."""
        return self.place.read_many([Part(location) for location in locations])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}


def parse_csv(content: bytes, where: str) -> tuple[dict[str, Label], dict[int, str]]:
    """Path → label, and label → class name where there is such a column. Raises UserError."""
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    if not {FILE, LABEL} <= set(rows.fieldnames or ()):
        raise UserError(f"{where} must begin with a header line that has {FILE} and {LABEL}, got {rows.fieldnames}")
    labelled: dict[str, Label] = {}
    class_names: dict[int, str] = {}
    for row in rows:
        path, label = row[FILE], row[LABEL]
        if path in labelled:
            raise UserError(f"{where}, line {rows.line_num}: {path} comes a second time")
        labelled[path] = label
        if row.get(CLASS_NAME):
            try:
                number = int(label)
            except (TypeError, ValueError):
                raise UserError(f"{where}, line {rows.line_num}: {CLASS_NAME} names integers, not {label!r}") from None
            if class_names.setdefault(number, row[CLASS_NAME]) != row[CLASS_NAME]:
                raise UserError(f"{where}, line {rows.line_num}: label {number} has two names")
    return labelled, class_names


def parse_json(content: bytes, where: str) -> dict[str, Label]:
    """Path → label of EDM's `dataset.json`; empty when its labels are null. Raises UserError."""
    try:
        pairs = json.loads(content)["labels"]
        return {str(path): None if label is None else int(label) for path, label in pairs or []}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where} must be {{"labels": [["a.png", 3], …]}} ({error!r})') from error
