"""What a source found: the samples, and what it saw and left out, so that nothing is skipped unsaid."""

from __future__ import annotations

from dataclasses import dataclass

from storage.index import Index


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Samples in row order, and the paths of files that are no samples by the source's rule."""

    index: Index
    left_out: tuple[str, ...] = ()
