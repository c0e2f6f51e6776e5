"""Tensors in a file: what a pickle's call would rebuild, checked against the storage that it names.

A tensor lies within its storage, so that what a file declares costs no more memory than the file has bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storage.base.shown import shown
from storage.weights.unpickle import Made, Named

REBUILT = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
OF_A_TYPE = "torch._tensor._rebuild_from_type_v2"
PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


class DamagedError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class Storage:
    """One flat run of numbers: its dtype (None: bytes), how many of them there are, and what reads their bytes."""

    name: str
    dtype: torch.dtype | None
    n: int
    read: Callable[[], bytearray]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    nbytes: int
    storage: str  # where it lies, beside others perhaps
    storage_nbytes: int  # what is read of the file for it
    read: Callable[[], Tensor]


def stored(made: Made) -> Stored | None:
    """The tensor that a call would rebuild, checked; None for what is none."""
    arguments = made.arguments
    if made.of in PARAMETERS and arguments and isinstance(arguments[0], Made):
        return stored(arguments[0])
    if made.of == OF_A_TYPE and len(arguments) > 2:
        function, kind, inner = arguments[:3]
        plain = isinstance(kind, Named) and kind.name in PLAIN_TYPES
        if plain and isinstance(function, Named) and isinstance(inner, tuple):
            return stored(Made(function.name, inner))
        return None
    if made.of not in REBUILT:
        return None
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise DamagedError("a tensor of it has no storage")
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype
    if made.of.endswith("_v3"):
        dtype = _dtype_named(arguments[6] if len(arguments) > 6 else None)
    if dtype is None:
        raise DamagedError("a tensor of it has no dtype")
    sizes_fit = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
    if not (sizes_fit and all(map(is_count, (offset, *shape, *strides)))):
        raise DamagedError("a tensor of it has no shape")
    n, in_storage = product(shape), bytes_of(storage) // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if n and (n > in_storage or last >= in_storage):
        raise DamagedError(f"a tensor of it, {list(shape)[:8]}, reaches beyond its storage of {in_storage:,} numbers")

    def read() -> Tensor:
        if not n:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(storage.read(), dtype=torch.uint8)[: in_storage * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, strides, offset).clone(memory_format=torch.contiguous_format)

    return Stored(shape, n * dtype.itemsize, storage.name, bytes_of(storage) if n else 0, read)


def _dtype_named(named: Any) -> torch.dtype | None:
    dtype = getattr(torch, named.name.removeprefix("torch."), None) if isinstance(named, Named) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def size_of(dtype: torch.dtype | None) -> int:
    """Bytes of a number; of what has no dtype, 1."""
    return 1 if dtype is None else dtype.itemsize


def bytes_of(storage: Storage) -> int:
    """Bytes that a storage says it has."""
    return storage.n * size_of(storage.dtype)


def is_count(n: Any) -> bool:
    """Whether a pickle's value can be a size, an offset or a stride."""
    return type(n) is int and 0 <= n < 2**62


def product(shape: tuple[int, ...]) -> int:
    """Numbers of a shape."""
    n = 1
    for size in shape:
        n *= size
    return n


def kind_of(made: Made) -> str:
    """The class that a call would have made: the first that it was given, or its own name."""
    if made.of == OF_A_TYPE and len(made.arguments) > 1 and isinstance(made.arguments[1], Named):
        return shown(made.arguments[1].name[:80])
    given = next((item.name for item in made.arguments if isinstance(item, Named)), made.of)
    return shown((given if made.of.startswith(("copyreg.", "torch._utils._rebuild_wrapper")) else made.of)[:80])
