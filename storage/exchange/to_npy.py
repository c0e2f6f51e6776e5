"""A folder with one `.npy` for every array, (N, V, *row_shape), for memory mapping; index.parquet; attributes.json."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from storage.exchange.content import Content
from storage.index import index_bytes


def write(content: Content, out: Path) -> None:
    """Write the folder."""
    out.mkdir()
    (out / "attributes.json").write_text(json.dumps(content.attributes, indent=1, sort_keys=True))
    (out / "index.parquet").write_bytes(index_bytes(content.index))
    np.save(out / "row.npy", content.rows)
    with ExitStack() as opened:
        files = {}
        for column in content.columns:  # not through a memory map, where a full disk is a signal and no error
            files[column.name] = opened.enter_context(open(out / f"{column.short}.npy", "xb"))
            header = {"shape": (len(content.rows), *column.shape), "fortran_order": False}
            npy.write_array_header_1_0(files[column.name], {**header, "descr": npy.dtype_to_descr(column.dtype)})
        for _, arrays in content.batches():
            for name, values in arrays.items():
                files[name].write(np.ascontiguousarray(values).data)
