"""Archives in NumPy's layout whose headers say what they do not hold."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np


def write_npz(path: Path, *, data: bytes = b"", **arrays: tuple[str, tuple[int, ...]]) -> Path:
    """An `.npz` of arrays (dtype, shape), of each of which only `data` is there."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (descr, shape) in arrays.items():
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue() + data)
    return path
