"""What the job asks of a source. A source is one file with one class that satisfies `Source`.

A source lists its samples once, in an order that depends on nothing but the data, and hands out samples by the
locations that it listed. It is pickled to decode tasks on other machines, so it holds the name of its data, absolute,
and no handles.

Two kinds of trouble are kept apart. A *sample* that is absent, forbidden or damaged is handed out as `Unreadable`, and
is recorded as failed. A *container* (a tar, a Parquet file, a bucket, a mount) that cannot be read is raised, so that
the unit is tried again, perhaps on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.sources.labels import AS_FOUND, LabelOptions
from pipeline.sources.listing import Listing


@dataclass(frozen=True)
class Unreadable:
    """Stands for a sample whose bytes cannot be had; the reason is recorded with its key."""

    reason: str


MAX_SAMPLE_BYTES = 256 << 20  # of one encoded image; a container may declare anything


def too_large(nbytes: int) -> Unreadable:
    """For a sample whose container declares more bytes than an image may have."""
    return Unreadable(f"declares {nbytes:,} bytes, an encoded image may have {MAX_SAMPLE_BYTES:,}")


Sample = bytes | np.ndarray | Unreadable  # an encoded image; uint8 (H, W, 3), decoded already; neither


class Source(Protocol):
    """Where images come from."""

    kind: str

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """Every sample, deterministically ordered, with labels as the user wants them.

        Raises UserError when there is none, and where labels are lost or could only be guessed.
        """
        ...

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The samples at locations that `listing` gave, in that order. Raises what a container that fails raises.

        A unit's locations come in one call, in the order of the listing, so that a container is opened once.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """`kind` and `path`, from which `open_source` opens it again; no number depends on them."""
        ...
