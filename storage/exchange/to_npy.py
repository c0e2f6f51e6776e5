"""A folder with one `.npy` for every array, (N, V, *row_shape), for memory mapping; index.parquet; attributes.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from storage.exchange.content import Content
from storage.index import index_bytes


def write(content: Content, out: Path) -> None:
    """Write the folder."""
    out.mkdir()
    (out / "attributes.json").write_text(json.dumps(content.attributes, indent=1, sort_keys=True))
    (out / "index.parquet").write_bytes(index_bytes(content.index))
    np.save(out / "row.npy", content.rows)
    files = {
        column.name: open_memmap(
            out / f"{column.short}.npy", mode="w+", dtype=column.dtype, shape=(len(content.rows), *column.shape)
        )
        for column in content.columns
    }
    for where, arrays in content.batches():
        for name, values in arrays.items():
            files[name][where] = values
    for file in files.values():
        file.flush()
