"""What a measurement was asked for, beside its result: whether a result at hand is what would be measured now.

A card says by digests what was measured, and to compute these anew is to measure anew. So a result also keeps, of the
reference and of a weight file that was named, where they lie and a stamp: of sizes and times of change, which costs a
look at each file. The second time of a file cannot be set, so that a file put in the place of another is noticed. A
stamp that is another proves nothing: then statistics and weights are read, and their digests held against the card's.
What is gone has no stamp, and has not been replaced.

Weights that are not named are those of a cache, whose files are named after what is in them, and of a store's images
its index stands for all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage import open_store
from storage.layout import INDEX_FILE, METADATA
from storage.roots import absolute, is_url
from trainer.evaluation.quality.card import Card

REFERENCE_STAMP, WEIGHTS, WEIGHTS_STAMP = "reference_stamp", "weights", "weights_stamp"
HELD_OUT_STAMP = "held_out_stamp"
STAMPS = (REFERENCE_STAMP, WEIGHTS_STAMP, HELD_OUT_STAMP)


def asked_for(
    reference: Path | str, weights: Path | None, *, n_reference: int, resamples: int, held_out: Path | None = None
) -> dict[str, Any]:
    """As JSON has it. Raises UserError for a store at a URL that cannot be read."""
    return {
        "reference": absolute(reference),
        REFERENCE_STAMP: stamp(reference),
        "n_reference": n_reference,
        "resamples": resamples,
        WEIGHTS: absolute(weights) if weights is not None else None,
        WEIGHTS_STAMP: stamp(weights) if weights is not None else None,
        "held_out": absolute(held_out) if held_out is not None else None,
        HELD_OUT_STAMP: stamp(held_out) if held_out is not None else None,
    }


def is_what_was_asked(
    before: dict[str, Any], now: dict[str, Any], card: Card, weights: Path | None, statistics: Callable[[], str | None]
) -> bool:
    """Whether a result that was asked for as `before`, of `card`, answers `now`.

    `statistics` gives the digest of the reference's statistics; None where more than these are compared with.
    """
    gone = {name for name in STAMPS if now[name] is None and name in before}
    differing = {name for name in now if name not in before or before[name] != now[name]} - gone
    if REFERENCE_STAMP in differing and statistics() != (card.reference_sha256 or ""):
        return False
    if differing & {WEIGHTS, WEIGHTS_STAMP} and (weights is None or _sha256(weights) != card.extractor_sha256):
        return False
    return differing <= {REFERENCE_STAMP, WEIGHTS, WEIGHTS_STAMP}


def stamp(where: Path | str) -> str | None:
    """A digest that is another where what lies there may be another, however it is spelled; None where nothing does."""
    sha = hashlib.sha256()
    if is_url(str(where)):
        sha.update(str(open_store(where).attributes.get("index_digest")).encode())
        return sha.hexdigest()
    path = Path(where)
    if not path.exists():
        return None
    of_store = path.is_dir() and (path / METADATA).is_file()
    for file in [path / INDEX_FILE] if of_store else _files(path) if path.is_dir() else [path]:
        sha.update(f"{file.relative_to(path)}\0{_changed(file)}\0".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth but dot files, in order; links are followed, each folder once."""
    seen = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at, name) for name in sorted(names) if not name.startswith("."))


def _changed(file: Path) -> tuple[int, ...]:
    """Size and times; -1 of a file that is gone."""
    try:
        status = file.stat()
    except OSError:
        return (-1,)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _sha256(file: Path) -> str | None:
    """None where there is no such file, which whoever describes images says."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
