"""A request to the shard files of an array: which chunks, where they lie, and the memory that they are read into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Read(NamedTuple):
    """Neighbouring chunks of one shard: where they start, which slots they are, and what they are read into.

    `buffers` alternates a chunk's memory and a buffer of its checksum; the last checksum may be left out, and they may
    all be the same scratch.
    """

    unit: int
    offset: int
    n_bytes: int  # of all buffers
    slots: list[int]
    buffers: list[Any]


class ReadError(Exception):
    """Raised with the read that failed and, in words, why and what to do."""


Check = Callable[[Read], None]
