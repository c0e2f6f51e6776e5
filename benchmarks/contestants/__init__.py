"""The storage formats that are measured side by side. One file each, with the same three things:

ARRAY-AGNOSTIC  a sample is the arrays of a `Spec`: what a codec stores of the features (`storage/codecs`), and moments
write(root, spec, n_rows)       every row of `make_rows` in the format's own recommended way for random access
VARIANTS                        name → how it is read, for every way its documentation recommends
batches(root, spec, order, batch, variant, workers) → iterator of {name: torch tensor (B, *row_shape)}

`WORKERS` are the numbers of worker processes to try. A variant that cannot follow a given order (WebDataset) is named
in `OWN_ORDER`; who reads another's files instead of writing any names it in `SHARES`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from storage.codecs import CODECS

NAMES = (
    "ours", "preadv", "tensorstore", "zarr_python", "array_record", "safetensors_file", "mds", "litdata_chunks",
    "webdataset_tar", "hdf5", "hf_datasets", "npy_file",
)  # fmt: skip
ROWS_A_FILE = 512


@dataclass(frozen=True)
class Array:
    """One array of a sample."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


Spec = tuple[Array, ...]
MOMENTS = Array("moments", "float16", (8, 32, 32))
TOKENS = (256, 768)  # DINOv2-B at 256 px
SPECS: dict[str, Spec] = {
    spelling: (*(Array(name, *stored) for name, stored in codec.arrays(*TOKENS).items()), MOMENTS)
    for spelling, codec in CODECS.items()
}


def make_rows(spec: Spec, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows [start, stop) of every array: incompressible, finite, the same every time."""
    found = {}
    for i, array in enumerate(spec):
        n = (stop - start) * array.n_bytes // 2
        raw = np.random.default_rng([start, i]).integers(0, 0x7BFF, n, dtype=np.uint16)  # finite as float16
        found[array.name] = raw.view(array.dtype).reshape(stop - start, *array.shape)
    return found


def contestant(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.contestants.{name}")
