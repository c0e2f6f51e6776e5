"""Parquet as on the Hugging Face hub: a column `image`, a struct {bytes, path} or plain bytes, and a column `label`.

Class names come from the schema's Hugging Face metadata, or from `classes.txt`. Samples are in the order of the files'
names, then of their rows; the key is the file's name without suffix and the row (`train-00000-of-00294/000123`).
Listing reads footers and the label column, files on several threads; sizes of single images stay unknown. A unit reads
each of its row groups once, and of them the image column alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.files import UNKNOWN_BYTES, File
from pipeline.sources.found import LISTING_THREADS, Found, look
from pipeline.sources.listing import Listing, make_listing, number_labels
from pipeline.sources.protocol import Sample, Unreadable
from storage.errors import UserError

IMAGE, LABEL = "image", "label"
BATCH_ROWS = 64


class Parquet:
    """One or more Parquet files. `location` is `file.parquet#row group:row in it`."""

    kind = "parquet"
    expects = "Parquet files with the columns image and label, as on the Hugging Face hub"

    def __init__(self, found: Found) -> None:
        self.data, self.place = found.data, found.place

    @staticmethod
    def recognises(found: Found) -> bool:
        """By suffix."""
        return bool(found.having(".parquet"))

    def listing(self) -> Listing:
        """List every row. Raises UserError where a file is no such Parquet file or there is no row."""
        found = look(self.data)
        files = found.one_split(".parquet")
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            below = list(pool.map(self._read_labels, files))
        rows = [(file, group, row) for file, (groups, _, _) in zip(files, below, strict=True) for group, row in groups]
        if not rows:
            raise UserError(f"DATA {self.data} has {len(files)} Parquet files and no row in them")
        if len({tuple(names) for _, _, names in below}) > 1:
            raise UserError(f"DATA {self.data}: its files name their classes differently; precompute them one by one")
        labels, names = number_labels([label for _, file_labels, _ in below for label in file_labels])
        return make_listing(
            keys=[
                f"{file.path[: -len('.parquet')]}/{number:06d}"
                for file, (groups, _, _) in zip(files, below, strict=True)
                for number in range(len(groups))
            ],
            labels=labels,
            class_names={**names, **dict(enumerate(below[0][2])), **found.class_names()},
            locations=[f"{file.path}#{group}:{row}" for file, group, row in rows],
            nbytes=[UNKNOWN_BYTES] * len(rows),
            data_bytes=sum(file.nbytes for file in files),
            left_out=found.left_out(files),
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The rows' bytes, each row group read once as long as locations go upwards."""
        wanted = [_parse(location) for location in locations]
        for path, of_file in groupby(wanted, key=lambda where: where[0]):
            with self.place.open(path) as handle, pq.ParquetFile(handle) as file:
                for group, of_group in groupby(of_file, key=lambda where: where[1]):
                    yield from _rows(file, group, [row for _, _, row in of_group])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path, pattern or URL."""
        return {"kind": self.kind, "path": self.data}

    def _read_labels(self, file: File) -> tuple[list[tuple[int, int]], list[Any], list[str]]:
        """(row group, row) and label of each row, and the class names."""
        try:
            with self.place.open(file.path) as handle, pq.ParquetFile(handle) as table:
                schema = table.schema_arrow
                _check(schema, f"{self.place.root}/{file.path}")
                sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                rows = [(group, row) for group, n in enumerate(sizes) for row in range(n)]
                has_labels = LABEL in schema.names
                labels = table.read([LABEL])[LABEL].to_pylist() if has_labels else [None] * len(rows)
                return rows, labels, _class_names(schema)
        except pa.ArrowException as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"{self.place.root}/{file.path} is no whole Parquet file ({first_line})") from error


def _rows(file: pq.ParquetFile, group: int, rows: Sequence[int]) -> Iterator[Sample]:
    """Rows of one row group, in the order asked for, which is read through once when they go upwards."""
    batches: Iterator[Any] = iter(())
    first, stop, column = 0, 0, None
    for row in rows:
        if column is None or row < first:
            batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE])
            first, stop = 0, 0
        while row >= stop:
            column = _encoded(next(batches).column(0))
            first, stop = stop, stop + len(column)
        assert column is not None
        data = column[row - first].as_py()
        yield Unreadable("the image column is null") if data is None else data


def _parse(location: str) -> tuple[str, int, int]:
    path, _, rest = location.rpartition("#")
    group, _, row = rest.partition(":")
    return path, int(group), int(row)


def _encoded(column: Any) -> Any:
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _check(schema: pa.Schema, where: str) -> None:
    if IMAGE not in schema.names:
        raise UserError(f"{where} has no column {IMAGE!r}; it has {', '.join(schema.names)}; rename the column")
    kind = schema.field(IMAGE).type
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            raise UserError(f"{where}: the column {IMAGE!r} has no field 'bytes'; it is {kind}")
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{where}: the column {IMAGE!r} must hold encoded images as binary, it holds {kind}")
    if LABEL in schema.names and not (
        pa.types.is_integer(schema.field(LABEL).type) or pa.types.is_string(schema.field(LABEL).type)
    ):
        raise UserError(f"{where}: the column {LABEL!r} must be integers or names, it is {schema.field(LABEL).type}")


def _class_names(schema: pa.Schema) -> list[str]:
    """The names of the label's classes in the Hugging Face metadata, if they are there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
