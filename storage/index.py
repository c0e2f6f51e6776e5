"""`index.parquet`: row i ↔ sample i, for every array of the store.

Columns: `key` (string, unique; the sample's name in its source), `label` (int64; −1 where the source has none),
`class_name` (string, dictionary encoded), `location` (string; where the source finds the bytes), `nbytes` (int64; size
of the encoded image, −1 where it is not known). The index digest covers key, label and class name in row order, not
locations: moving a data set does not change what its rows mean.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import StoreError, UserError
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


def read_index(root: Root) -> Index:
    """Read `index.parquet`; raises StoreError when it is absent or not an index."""
    with _index_file(root) as file:
        return Index(file.read(columns=SCHEMA.names).select(SCHEMA.names).cast(SCHEMA))


def read_classes(root: Root) -> Classes:
    """Labels and class names of `index.parquet`, decoded a row group at a time; raises StoreError as `read_index` does.

    From a directory it is read so, too; from an object store the file is fetched whole and held meanwhile.
    """
    with _index_file(root) as file:
        labels = np.empty(file.metadata.num_rows, dtype=np.int32)
        names: dict[int, str] = {}
        start = 0
        for batch in file.iter_batches(batch_size=ROW_GROUP, columns=["label", "class_name"]):
            labels[start : start + len(batch)] = batch["label"].cast(pa.int32())
            start += len(batch)
            names |= _label_names(pa.Table.from_batches([batch]))
    return Classes(labels=labels, class_names=ClassNames(names))


def _label_names(table: pa.Table) -> dict[int, str]:
    pairs = table.select(["label", "class_name"]).group_by(["label", "class_name"]).aggregate([])
    return dict(zip(pairs["label"].to_pylist(), pairs["class_name"].to_pylist(), strict=True))


@contextmanager
def _index_file(root: Root) -> Iterator[pq.ParquetFile]:
    where = root.at(INDEX_FILE)
    try:
        with root.open(INDEX_FILE) as raw, pq.ParquetFile(raw, read_dictionary=["class_name"]) as file:
            absent = set(SCHEMA.names) - set(file.schema_arrow.names)
            if absent:
                raise KeyError(f"no column {', '.join(sorted(absent))}")
            yield file
    except FileNotFoundError:
        raise StoreError(f"{root} has no {INDEX_FILE}, so it is not a store; make one with `make precompute`") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{where} is not an index ({first}); restore it or precompute into a new root") from error
