"""One HDF5 file: a dataset (N, V, *row_shape) for every array, one row a chunk, and key, label, class_name, row (N,).

The file's attribute `offline_repa` holds identities and the like as JSON; `from_hdf5` reads it back.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from storage.exchange.content import Content


def write(content: Content, out: Path) -> None:
    """Write the file."""
    text = h5py.string_dtype()
    with h5py.File(out, "w") as file:
        file.attrs["offline_repa"] = json.dumps(content.attributes, sort_keys=True)
        file["row"] = content.rows
        file["label"] = content.index.labels
        file.create_dataset("key", data=np.array(content.index.keys, dtype=object), dtype=text)
        names = content.index.table["class_name"].to_pylist()
        file.create_dataset("class_name", data=np.array(names, dtype=object), dtype=text)
        for column in content.columns:
            file.create_dataset(
                column.name, (len(content.rows), *column.shape), column.dtype, chunks=(1, *column.shape)
            )
        for where, arrays in content.batches():
            for name, values in arrays.items():
                file[name][where] = values
