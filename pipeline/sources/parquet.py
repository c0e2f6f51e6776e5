"""Parquet as on the Hugging Face hub: a column `image`, a struct {bytes, path} or plain bytes, and a column `label`.

Another column of labels is named by --label-column. Labels are numbers or names of any Arrow type for these,
dictionaries of them included. Class names come from the schema's Hugging Face metadata, or from `classes.txt`. The
images' paths, which may name any file, are never followed. Samples are in the order of the files' names, then of their
rows; the key is the file's name without suffix and the row (`train-00000-of-00294/000123`).
Listing reads footers and the label column, files on several threads; sizes of single images stay unknown. A unit reads
each of its row groups once, and of them the image column alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.data_entries import LISTING_THREADS, DataEntries, list_entries
from pipeline.sources.files import UNKNOWN_BYTES, File
from pipeline.sources.labels import AS_FOUND, MAX_NAME, Label, LabelOptions
from pipeline.sources.listing import Listing, make_listing
from pipeline.sources.protocol import MAX_SAMPLE_BYTES, Sample, Unreadable, too_large
from storage.base.boundary import parse_json
from storage.base.errors import StoreError, UserError
from storage.base.shown import shown

IMAGE, LABEL = "image", "label"
BATCH_ROWS = 64
PAGE_BYTES = 1 << 20  # read at once while listing: what is looked at is a small part of a row group
LABEL_TYPES = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)
LABEL_BATCH_ROWS = 65536
SHOWN_COLUMNS, SHOWN_CHARACTERS = 20, 60  # in a message
MAX_NAME_BYTES = 4 * MAX_NAME
MOST_INFLATION = 100  # of what exceeds one image: encoded images hardly shrink, bitmaps tenfold
HUGGING_FACE = b"huggingface"  # key of the schema's metadata


class Parquet:
    """One or more Parquet files. `location` is `file.parquet#row group:row in it`."""

    kind = "parquet"
    expects = "Parquet files with the columns image and label, as on the Hugging Face hub"

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By suffix."""
        return bool(entries.having(".parquet"))

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every row. Raises UserError where a file is no such Parquet file or there is no row."""
        column = wanted.column or LABEL
        entries = list_entries(self.data)
        files = entries.one_split(".parquet")
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            below = list(pool.map(lambda file: self._read_labels(file, wanted), files))
        rows = [
            (file, group, row) for file, (groups, _, _, _) in zip(files, below, strict=True) for group, row in groups
        ]
        if not rows:
            raise UserError(f"DATA {self.data} has {len(files)} Parquet files and no row in them")
        if len({tuple(names) for _, _, names, _ in below}) > 1:
            raise UserError(f"DATA {self.data}: its files name their classes differently; precompute them one by one")
        return make_listing(
            keys=[
                f"{file.path[: -len('.parquet')]}/{number:06d}"
                for file, (groups, _, _, _) in zip(files, below, strict=True)
                for number in range(len(groups))
            ],
            labels=[label for _, file_labels, _, _ in below for label in file_labels],
            class_names={**dict(enumerate(below[0][2])), **entries.class_names()},
            locations=[f"{file.path}#{group}:{row}" for file, group, row in rows],
            nbytes=[UNKNOWN_BYTES] * len(rows),
            data_bytes=sum(file.nbytes for file in files),
            left_out=entries.left_out(files),
            wanted=wanted,
            looked_in=f"{self._name(files[0])}, column {column!r}; the file has the columns {_listed(below[0][3])}",
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

    def _name(self, file: File) -> str:
        return shown(f"{self.place.root}/{file.path}")

    def _read_labels(
        self, file: File, wanted: LabelOptions
    ) -> tuple[list[tuple[int, int]], list[Label], list[str], list[str]]:
        """(row group, row) and label of each row, the class names, and the names of all columns."""
        where, column = self._name(file), wanted.column or LABEL
        with (
            _parquet_errors(where),
            self.place.open(file.path) as handle,
            pq.ParquetFile(handle, buffer_size=PAGE_BYTES) as table,
        ):
            schema = table.schema_arrow
            _check_images(schema, where)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) > file.nbytes >= 0:
                raise UserError(
                    f"{where} says that it has {sum(sizes):,} rows in {file.nbytes:,} bytes; fetch it again"
                )
            _require_size(table, IMAGE, where)
            _require_bytes(table, where)
            rows = [(group, row) for group, n in enumerate(sizes) for row in range(n)]
            if wanted.unlabelled or not _check_labels(schema, column, wanted, where):
                return rows, [None] * len(rows), [], schema.names
            _require_size(table, column, where)
            labels: list[Label] = []
            # Names as a dictionary: as many rows of one long name would not fit into memory.
            named = pq.ParquetFile(handle, metadata=table.metadata, buffer_size=PAGE_BYTES, read_dictionary=[column])
            for batch in named.iter_batches(LABEL_BATCH_ROWS, columns=[column]):
                labels += _labels(_column(batch, column), f"{where}, column {column!r}")
            if len(labels) != len(rows):
                raise UserError(f"{where} has {len(rows)} rows and {len(labels)} labels; fetch it again")
            return rows, labels, _class_names(schema, column), schema.names


@contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    """What pyarrow raises for a damaged file becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first_line = shown((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"{where} is no whole Parquet file ({first_line})") from error


def _rows(file: pq.ParquetFile, group: int, rows: Sequence[int]) -> Iterator[Sample]:
    """Rows of one row group, in the order asked for, which is read through once when they go upwards."""
    batches: Iterator[Any] = iter(())
    first, stop, column = 0, 0, None
    for row in rows:
        if column is None or row < first:
            batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE])
            first, stop = 0, 0
        while row >= stop:
            column = _encoded(next(batches))
            first, stop = stop, stop + len(column)
        assert column is not None
        data = column[row - first].as_py()
        if data is None:
            yield Unreadable("the image column is null")
        else:
            yield data if len(data) <= MAX_SAMPLE_BYTES else too_large(len(data))


def _parse(location: str) -> tuple[str, int, int]:
    path, _, rest = location.rpartition("#")
    group, _, row = rest.partition(":")
    return path, int(group), int(row)


def _encoded(batch: pa.RecordBatch) -> Any:
    column = _column(batch, IMAGE)
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _column(batch: pa.RecordBatch, name: str) -> Any:
    """By name: a column `image.x` is read along with `image`, and may stand before it."""
    return batch.column(batch.schema.get_field_index(name))


def _labels(column: pa.Array, where: str) -> list[Label]:
    """A batch's labels. Raises UserError where one is longer than a class name may be, before each row has a copy."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values = column.dictionary.to_pylist()
    longest = max((len(value) for value in values if isinstance(value, str | bytes)), default=0)
    if longest > MAX_NAME_BYTES:
        raise UserError(
            f"{where} holds a name of {longest:,} characters, a class name may have {MAX_NAME:,}; name another "
            "column by --label-column"
        )
    return [None if place is None else values[place] for place in column.indices.to_pylist()]


def _check_images(schema: pa.Schema, where: str) -> None:
    if schema.names.count(IMAGE) != 1:
        n = schema.names.count(IMAGE) or "no"
        raise UserError(f"{where} has {n} column {IMAGE!r}; it has {_listed(schema.names)}; rename the column")
    kind = schema.field(IMAGE).type
    if pa.types.is_struct(kind):
        if kind.get_all_field_indices("bytes") != [kind.get_field_index("bytes")]:
            raise UserError(f"{where}: the column {IMAGE!r} has no field 'bytes'; it is {_short(kind)}")
        kind = kind.field("bytes").type
    if not _is_bytes(_plain(kind)):
        raise UserError(f"{where}: the column {IMAGE!r} must hold encoded images as binary, it holds {_short(kind)}")


def _check_labels(schema: pa.Schema, column: str, wanted: LabelOptions, where: str) -> bool:
    """Whether the column of labels is there. Raises UserError where it holds neither numbers nor names."""
    if schema.names.count(column) != 1:
        if wanted.column or column in schema.names:
            n = schema.names.count(column) or "no"
            raise UserError(f"{where} has {n} column {column!r} (--label-column); it has {_listed(schema.names)}")
        return False
    kind = _plain(schema.field(column).type)
    if not (any(is_one(kind) for is_one in LABEL_TYPES) or _is_bytes(kind)):
        raise UserError(
            f"{where}: the column {column!r} must hold numbers or names, it holds {_short(kind)}; name another of "
            f"{_listed(schema.names)} by --label-column, or pass --unlabelled"
        )
    return True


def _require_size(table: pq.ParquetFile, column: str, where: str) -> None:
    """Raise UserError where a row group of a column would inflate to more than encoded images or names take."""
    most_a_row = MAX_SAMPLE_BYTES if column == IMAGE else MAX_NAME_BYTES
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        chunks = [about.column(i) for i in range(about.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]
        inflated = sum(chunk.total_uncompressed_size for chunk in chunks)
        packed = sum(chunk.total_compressed_size for chunk in chunks)
        bound = max(PAGE_BYTES, about.num_rows * most_a_row)
        if inflated > min(bound, max(MAX_SAMPLE_BYTES, MOST_INFLATION * packed)):
            raise UserError(
                f"{where}: the column {column!r} declares {inflated:,} bytes in {packed:,} for {about.num_rows:,} rows "
                f"of row group {group}, more than {'images' if column == IMAGE else 'labels'} take; look at the "
                "file, and leave it out or write it again"
            )


def _require_bytes(table: pq.ParquetFile, where: str) -> None:
    """Raise UserError where no row has an image's bytes: a hub's data set of paths alone.

    Asked of the column itself, the first row first: pyarrow ends the process over statistics that are damaged.
    """
    named = {table.metadata.schema.column(i).path for i in range(len(table.metadata.schema))}
    column = next(path for path in (f"{IMAGE}.bytes", IMAGE) if path in named)
    for batch_rows in (1, 1024):
        for batch in table.iter_batches(batch_size=batch_rows, columns=[column]):
            values = batch.column(0)
            values = values.field(0) if pa.types.is_struct(values.type) else values
            if len(values) > values.null_count:
                return
            if batch_rows == 1:
                break
    if table.metadata.num_rows:
        raise UserError(
            f"{where}: no row of the column {IMAGE!r} has bytes; paths to files elsewhere are not followed, put the "
            "images' bytes into the file"
        )


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a dictionary's values, or the type itself."""
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    ) and not types.is_decimal(kind)


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of the label's classes in the Hugging Face metadata, if they are there."""
    try:
        about = parse_json(dict[str, Any], (schema.metadata or {}).get(HUGGING_FACE, b"{}"), "metadata", "mend it")
        names = about["info"]["features"][column]["names"]
        return [str(name) for name in names] if isinstance(names, list) else []
    except (KeyError, TypeError, StoreError):
        return []


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(shown(name)[:SHOWN_CHARACTERS] for name in names[:SHOWN_COLUMNS])
    return f"{listed}, …" if len(names) > SHOWN_COLUMNS else listed


def _short(kind: pa.DataType) -> str:
    return shown(str(kind))[:SHOWN_CHARACTERS]
