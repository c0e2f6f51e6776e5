"""One Parquet file: a row a sample, each array as fixed-size binary, little-endian, V × row_shape numbers.

Shapes and dtypes are in the metadata of each column's field, the rest in the schema's. Row groups stay under the memory
of a batch. Encoded rows do not compress, so nothing is compressed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.exchange.content import Content


def write(content: Content, out: Path) -> None:
    """Write the file."""
    fields = [pa.field("row", pa.int64()), pa.field("key", pa.string()), pa.field("label", pa.int64())]
    fields.append(pa.field("class_name", pa.string()))
    for column in content.columns:
        row_bytes = int(np.prod(column.shape)) * column.dtype.itemsize
        about = {"dtype": column.dtype.name, "shape": json.dumps(column.shape)}
        fields.append(pa.field(column.name, pa.binary(row_bytes), metadata=about))
    schema = pa.schema(fields, metadata={"offline_repa": json.dumps(content.attributes, sort_keys=True)})
    samples = content.index.table
    with pq.ParquetWriter(out, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for where, arrays in content.batches():
            part = samples.slice(where.start, where.stop - where.start)
            columns = [
                pa.array(content.rows[where]),
                part["key"].combine_chunks(),
                part["label"].combine_chunks(),
                part["class_name"].combine_chunks().cast(pa.string()),
            ]
            for column in content.columns:
                values = np.ascontiguousarray(arrays[column.name])
                kind = schema.field(column.name).type
                columns.append(pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
