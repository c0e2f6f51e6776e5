"""`index.parquet`: row i ↔ sample i, for every array of the store.

Columns: `key` (string, unique; the sample's name in its source), `label` (int64; −1 where the source has none),
`class_name` (string, dictionary encoded), `location` (string; where the source finds the bytes), `nbytes` (int64; size
of the encoded image, −1 where it is not known). The index digest covers key, label and class name in row order, not
locations: moving a data set does not change what its rows mean.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

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
INDEX_COLUMNS = tuple(SCHEMA.names)


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
    def class_names(self) -> list[str]:
        """Class names; position = label. A label nobody has is the empty string."""
        pairs = self.table.select(["label", "class_name"]).group_by(["label", "class_name"]).aggregate([])
        labels, names = pairs["label"].to_pylist(), pairs["class_name"].to_pylist()
        by_label = ["" for _ in range(max(labels, default=-1) + 1)]
        for label, name in zip(labels, names, strict=True):
            if label >= 0:
                by_label[label] = name
        return by_label

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
    """An index from columns of equal length, rows in the order given; raises UserError when a key occurs twice."""
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
    pq.write_table(index.table, buffer, compression="zstd", row_group_size=131072)
    return buffer.getvalue()


def read_index(root: Root, columns: Sequence[str] = INDEX_COLUMNS) -> Index:
    """Read `index.parquet`, or some of its columns; raises StoreError when it is absent or not an index."""
    where = root.at(INDEX_FILE)
    try:
        raw = pa.BufferReader(root.read(INDEX_FILE))
        table = pq.read_table(raw, columns=list(columns), read_dictionary=["class_name"])
        return Index(table.select(columns).cast(pa.schema([SCHEMA.field(name) for name in columns])))
    except FileNotFoundError:
        raise StoreError(f"{root} has no {INDEX_FILE}, so it is not a store; make one with `make precompute`") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{where} is not an index ({first}); restore it or precompute into a new root") from error
