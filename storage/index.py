"""`index.parquet`: row i ↔ sample i, for every array of the store.

Columns: `key` (string, unique; the sample's name in its source), `label` (int64; −1 where the source has none),
`class_name` (string, dictionary encoded), `location` (string; where the source finds the bytes), `nbytes` (int64; size
of the encoded image, −1 where it is not known). The index digest covers key, label and class name in row order, not
locations: moving a data set does not change what its rows mean.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.base.errors import StoreError, UserError
from storage.layout import INDEX_FILE
from storage.roots import Root

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("class_name", pa.dictionary(pa.int32(), pa.string())),
        ("location", pa.string()),
        ("nbytes", pa.int64()),
    ]
)
ROW_GROUP = 131072  # rows; what is decoded at once
# What an index may claim of itself. Ours take 2 bytes a row or more, and inflate tenfold at most.
MAGIC = b"PAR1"
FOOTER_BYTES, MAX_FOOTER_BYTES = 64 << 10, 256 << 20
MIN_ROWS, ROWS_A_BYTE, MAX_GROUP_ROWS = 1 << 16, 16, 1 << 27
MIN_BYTES, INFLATES = 64 << 20, 100
MIN_LABELS, LABELS_A_ROW = 1 << 20, 4  # labels below either: the list of class names is as long as the largest
RESTORE = "restore it or precompute into a new root"
MAX_LABEL = 2**31 - 1
FREE_LABELS = 1 << 15  # numbers up to here need no excuse: more classes than ImageNet-21k and iNaturalist have
LABELS_A_CLASS = 10  # beyond it, at most so many numbers for a class that occurs


def far_apart(largest: int, n_classes: int) -> bool:
    """Whether a table with a row for each number up to the largest label would be nearly empty."""
    return largest >= FREE_LABELS and largest >= LABELS_A_CLASS * n_classes


class ClassNames(Sequence[str]):
    """Class names; position = label, and a label nobody has is the empty string. Memory goes with those that occur."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.occurring = {label: name for label, name in sorted(names.items()) if label >= 0}

    def __len__(self) -> int:
        return max(self.occurring, default=-1) + 1

    @overload
    def __getitem__(self, label: int) -> str: ...
    @overload
    def __getitem__(self, label: slice) -> list[str]: ...
    def __getitem__(self, label: int | slice) -> str | list[str]:
        if isinstance(label, slice):
            return [self[each] for each in range(len(self))[label]]
        return self.occurring.get(range(len(self))[label], "")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ClassNames):
            return self.occurring == other.occurring
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ClassNames({self.occurring})"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What training needs of the index: 4 bytes a row."""

    labels: np.ndarray  # int32 (N,), −1 where the source has none
    class_names: ClassNames


@dataclass(frozen=True)
class Index:
    """The table of samples; columns are decoded when asked for."""

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        return f"<Index: {len(self):,} samples by {', '.join(self.table.column_names)}>"

    @property
    def keys(self) -> list[str]:
        """Sample names in row order."""
        return self.table["key"].to_pylist()

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 (N,)."""
        return self.table["label"].to_numpy()

    @property
    def locations(self) -> list[str]:
        """Where the source finds each sample's bytes."""
        return self.table["location"].to_pylist()

    @property
    def class_names(self) -> ClassNames:
        """Class names; position = label. A label nobody has is the empty string."""
        return ClassNames(_label_names(self.table))

    def slice(self, rows: range) -> Index:
        """The samples of consecutive rows, without copying."""
        return Index(self.table.slice(rows.start, len(rows)))

    def digest(self) -> str:
        """SHA-256 (hex) over "key NUL label NUL class name LF" of every row."""
        sha = hashlib.sha256()
        for batch in self.table.select(["key", "label", "class_name"]).to_batches(max_chunksize=65536):
            key, label, name = (column.cast(pa.string()) for column in batch.columns)
            end = pa.array(["\n"] * len(batch), pa.string())
            lines = pc.binary_join_element_wise(pc.binary_join_element_wise(key, label, name, "\0"), end, "")
            sha.update(b"".join(lines.cast(pa.binary()).to_pylist()))
        return sha.hexdigest()


def make_index(
    keys: Sequence[str],
    labels: Sequence[int],
    class_names: Sequence[str],
    locations: Sequence[str],
    nbytes: Sequence[int],
) -> Index:
    """An index from columns of equal length, rows in the order given.

    Raises UserError when a key occurs twice, or a label is not below 2^31.
    """
    if max(labels, default=0) > MAX_LABEL:
        raise UserError(f"labels must be below 2^31, got {max(labels)}; number the classes from 0")
    columns = [keys, labels, class_names, locations, nbytes]
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
    counts = pc.value_counts(table["key"])
    twice = [entry["values"] for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()[:3]]
    if twice:
        raise UserError(f"keys must be unique, these occur more than once: {', '.join(twice)}; rename the samples")
    return Index(table)


def index_bytes(index: Index) -> bytes:
    """The index as a Parquet file; equal indexes give equal bytes under one pyarrow version."""
    buffer = io.BytesIO()
    pq.write_table(index.table, buffer, compression="zstd", row_group_size=ROW_GROUP)
    return buffer.getvalue()


def count_rows(root: Root) -> int:
    """Rows of `index.parquet`, by its footer alone. Raises StoreError as `read_index` does."""
    return _footer(root).num_rows


def read_sizes(root: Root) -> np.ndarray:
    """The column `nbytes`, int64 (N,): sizes of the images when they were listed; raises as `read_index` does."""
    n_rows = _agreed(root, None)
    return np.concatenate([batch["nbytes"].to_numpy() for _, batch in _batches(root, n_rows, ["nbytes"])])


def read_index(root: Root, n_rows: int | None = None) -> Index:
    """Read `index.parquet` of a store of `n_rows` (None: of any).

    Raises StoreError when it is absent, not an index, or of another number of rows.
    """
    batches = [batch for _, batch in _batches(root, _agreed(root, n_rows), SCHEMA.names)]
    return Index(pa.Table.from_batches(batches, SCHEMA))


def read_classes(root: Root, n_rows: int | None = None) -> Classes:
    """Labels and class names of `index.parquet`, decoded a row group at a time; raises StoreError as `read_index` does.

    From a directory it is read so, too; from an object store the file is fetched whole and held meanwhile.
    """
    n_rows = _agreed(root, n_rows)
    labels = np.empty(n_rows, dtype=np.int32)
    names: dict[int, str] = {}
    for start, batch in _batches(root, n_rows, ["label", "class_name"]):
        labels[start : start + len(batch)] = batch["label"].to_numpy()
        names |= _label_names(pa.Table.from_batches([batch]))
    return Classes(labels=labels, class_names=ClassNames(names))


def _label_names(table: pa.Table) -> dict[int, str]:
    pairs = table.select(["label", "class_name"]).group_by(["label", "class_name"]).aggregate([])
    return dict(zip(pairs["label"].to_pylist(), pairs["class_name"].to_pylist(), strict=True))


def _agreed(root: Root, n_rows: int | None) -> int:
    """The rows that the footer says; raises StoreError when the store has another number, before anything is read."""
    n_found = count_rows(root)
    if n_rows not in (None, n_found):
        raise StoreError(f"{root.at(INDEX_FILE)} has {n_found} rows, the store {n_rows}; restore both")
    return n_found


def _batches(root: Root, n_rows: int, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, the columns of the rows that follow it), as SCHEMA says, at most a row group at a time.

    A Parquet file of a few bytes can say a name of a megabyte a million times: names are decoded as dictionaries, and
    spelled out once it is known how long that makes them.
    """
    where = root.at(INDEX_FILE)
    n_decoded, start, most_label = 0, 0, max(MIN_LABELS, LABELS_A_ROW * n_rows)
    with _damage(root), root.open(INDEX_FILE) as raw:
        most_bytes = _most_bytes(raw.seek(0, os.SEEK_END))
        raw.seek(0)
        with pq.ParquetFile(raw, read_dictionary=["key", "class_name", "location"]) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=columns):
                decoded = {}
                for name in columns:
                    column = batch[name]
                    if column.null_count:
                        raise StoreError(f"{where}: no {name} in row {start} or one after; {RESTORE}")
                    if isinstance(column, pa.DictionaryArray):
                        n_decoded += _decoded_bytes(column)
                        if n_decoded > most_bytes:
                            raise StoreError(f"{where} would take more than {most_bytes:,} bytes to read; {RESTORE}")
                    decoded[name] = column.cast(SCHEMA.field(name).type)
                if "label" in decoded and len(batch) and pc.max(decoded["label"]).as_py() >= most_label:
                    raise StoreError(
                        f"{where}: label {pc.max(decoded['label'])}, and {n_rows} rows may have labels below "
                        f"{most_label:,}; number the classes from 0 and precompute into a new root"
                    )
                yield (
                    start,
                    pa.record_batch(list(decoded.values()), pa.schema([SCHEMA.field(name) for name in columns])),
                )
                start += len(batch)
        if start != n_rows:
            raise StoreError(f"{where} has {start} rows, the store {n_rows}; {RESTORE}")


def _footer(root: Root) -> pq.FileMetaData:
    """What the Parquet file says of itself, checked before any of it is decoded."""
    where = root.at(INDEX_FILE)
    with _damage(root):
        size, tail = root.tail(INDEX_FILE, FOOTER_BYTES)
        n_footer = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != MAGIC or n_footer > min(size, MAX_FOOTER_BYTES):
            raise StoreError(f"{where} is not an index (no Parquet file of ours); {RESTORE}")
        if n_footer > len(tail):
            tail = root.tail(INDEX_FILE, n_footer)[1]
        footer = pq.read_metadata(pa.BufferReader(MAGIC + tail[-n_footer:]))
        schema = footer.schema.to_arrow_schema()
        absent = set(SCHEMA.names) - set(schema.names)
        if absent:
            raise StoreError(f"{where} is not an index (no column {', '.join(sorted(absent))}); {RESTORE}")
        for field in SCHEMA:
            if not _may_be(schema.field(field.name).type, field.type):
                raise StoreError(
                    f"{where}: {field.name} is {schema.field(field.name).type}, not {field.type}; {RESTORE}"
                )
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        n_bytes = sum(group.total_byte_size for group in groups)
        most_rows = MIN_ROWS + ROWS_A_BYTE * size
        if footer.num_rows != sum(group.num_rows for group in groups) or not 0 < footer.num_rows <= most_rows:
            raise StoreError(f"{where} says that it has {footer.num_rows} rows in {size:,} bytes; {RESTORE}")
        if n_bytes > _most_bytes(size) or any(not 0 <= g.num_rows <= MAX_GROUP_ROWS for g in groups):
            raise StoreError(f"{where} says that {size:,} bytes become {n_bytes:,}; {RESTORE}")
    return footer


def _may_be(kind: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(wanted):
        wanted = wanted.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(wanted):
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    return bool(pa.types.is_integer(kind))


def _decoded_bytes(column: pa.DictionaryArray) -> int:
    """Bytes of a column of names when each is spelled out."""
    lengths = pc.binary_length(column.dictionary).to_numpy(zero_copy_only=False).astype(np.int64)
    return int(lengths[column.indices.to_numpy()].sum())


def _most_bytes(n_file: int) -> int:
    return MIN_BYTES + INFLATES * n_file


@contextmanager
def _damage(root: Root) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{root} has no {INDEX_FILE}, so it is not a store; make one with `make precompute`") from None
    except StoreError:
        raise
    except (pa.ArrowException, KeyError, ValueError, IndexError, OSError, MemoryError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{root.at(INDEX_FILE)} is not an index ({first}); {RESTORE}") from error
