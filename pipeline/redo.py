"""What is done again: units that are done and hold failed images, once these were mended or when it is asked for.

A run looks at the images that have failed, and only at those: where one has other bytes than its receipt says, its unit
is done again in the groups in which it failed; `--redo-failed` takes every unit that holds a failed image (a decoder
that was missing, say, or receipts of before, which know no bytes). A unit in which nothing has changed is left as it
is, decoded and not encoded. Images that are stored may not change: of those whose size is not the one in the index, the
first are read, and a run that would pair them with others ends before it begins. All others are compared while a unit
is decoded (`storage/samples.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from pipeline.sources import Source
from pipeline.sources.protocol import Unreadable
from storage.base.errors import StoreError, UserError
from storage.base.shown import counted, shown
from storage.index import Index, read_sizes
from storage.layout import STORE_RECEIPT
from storage.receipts import Receipt, check_metadata
from storage.roots import Root
from storage.samples import name_rows, sample_crc32c

LOOKED_AT = 4096  # failed images that are read again
COMPARED = 64  # stored images of another size that are read again
AT_ONCE = 64  # images in memory

Recorded = int | None  # the checksum of a sample's bytes; None where the receipt has none


@dataclass
class Done:
    """What the receipts of units that are done say of images that need a second look."""

    resized: np.ndarray  # int64, rows whose size is not the index's
    failed: dict[tuple[int, str], dict[int, Recorded]] = field(default_factory=dict)  # (unit, group) → by row
    stored: dict[int, tuple[str, Recorded]] = field(default_factory=dict)  # resized rows → a group that stores them
    n_groups: dict[int, int] = field(default_factory=dict)  # unit → how many groups have it

    def add(self, path: str, receipt: Receipt) -> None:
        """Note what a receipt says."""
        crcs = receipt.sample_crcs()
        start, stop = receipt.rows
        self.n_groups[receipt.unit] = self.n_groups.get(receipt.unit, 0) + 1
        recorded = {f.row: None if crcs is None else int(crcs[f.row - start]) for f in receipt.failed}
        if recorded:
            self.failed[receipt.unit, path] = recorded
        low, high = np.searchsorted(self.resized, [start, stop])
        for row in self.resized[low:high].tolist():
            if row not in recorded and self.stored.get(row, ("", None))[1] is None:
                self.stored[row] = (path, None if crcs is None else int(crcs[row - start]))

    def failed_rows(self, redo: Mapping[int, Sequence[str]] = MappingProxyType({})) -> set[int]:
        """Rows that failed in every group that has their unit, but for those that a group in `redo` does again.

        A row that one group has stored can be decoded: the others lag behind, since it was mended.
        """
        times: Counter[int] = Counter()
        unit_of: dict[int, int] = {}
        again: set[int] = set()
        for (unit, path), rows in self.failed.items():
            times.update(rows.keys())
            unit_of |= dict.fromkeys(rows, unit)
            if path in redo.get(unit, ()):
                again |= rows.keys()
        return {row for row, n in times.items() if n == self.n_groups[unit_of[row]] and row not in again}


def resized_rows(root: Root, index: Index) -> np.ndarray:
    """Rows whose size is known, was known when the store was made, and is another now; int64."""
    try:
        if check_metadata(root, STORE_RECEIPT)[1]:
            return np.zeros(0, dtype=np.int64)  # it is restored before anything is encoded
        before = read_sizes(root)
    except StoreError:
        return np.zeros(0, dtype=np.int64)
    now = index.table["nbytes"].to_numpy()
    return np.flatnonzero((before >= 0) & (now >= 0) & (before != now)) if len(before) == len(now) else np.zeros(0, int)


def units_to_redo(
    source: Source, index: Index, done: Done, asked: Sequence[str], *, every: bool
) -> tuple[dict[int, list[str]], list[str]]:
    """(unit → the groups of `asked` that do it again, what is to be said about it).

    `every`: also where nothing has changed. Costs one read of each failed image, of at most LOOKED_AT.
    """
    candidates = {of: rows for of, rows in done.failed.items() if of[1] in asked}
    notes: list[str] = []
    if every:
        chosen = list(candidates)
    else:
        resized = set(done.resized.tolist())
        rows = sorted({row for rows in candidates.values() for row, crc in rows.items() if crc is not None})
        if len(rows) > LOOKED_AT:
            notes.append(f"of {len(rows)} failed images the first {LOOKED_AT} are looked at; --redo-failed takes all")
        try:
            now = _crcs(source, index, rows[:LOOKED_AT])
        except Exception as error:  # whatever a container raises that cannot be read: nothing depends on it
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            notes.append(f"the failed images could not be looked at again ({shown(first_line)})")
            now = {}
        chosen = [
            of
            for of, recorded in candidates.items()
            if any(row in resized if crc is None else now.get(row, crc) != crc for row, crc in recorded.items())
        ]
    redo: dict[int, list[str]] = {}
    for unit, path in chosen:
        redo.setdefault(unit, []).append(path)
    n_failed = len({row for of in chosen for row in candidates[of]})
    if redo:
        notes.append(f"done again: {counted(len(redo), 'unit')}, in which {counted(n_failed, 'image')} had failed")
    lagging = sorted({path for unit, path in done.failed if unit in redo and path not in asked})
    if lagging:
        notes.append(f"images of these units have failed in {', '.join(lagging)}, too; name its encoder in the command")
    return redo, notes


def changed_images(root: Root, source: Source, index: Index, done: Done) -> tuple[list[int], str]:
    """(rows that are stored and whose image is another now, what to say of them)."""
    known = {row: crc for row, (_, crc) in done.stored.items() if crc is not None}
    looked_at = sorted(known)[:COMPARED]
    try:
        now = _crcs(source, index, looked_at)
    except Exception:  # as above; the units that are decoded are compared whole
        now = {}
    differ = {row for row in looked_at if row in now and now[row] != known[row]}
    if differ:  # the first are others, so the rest, which was not looked at, is taken to be
        differ |= known.keys() - set(looked_at)
    rows = sorted(differ | (done.stored.keys() - known.keys()))
    if not rows:
        return [], ""
    paths = sorted({done.stored[row][0] for row in rows})
    return rows, (
        f"{len(rows)} of {len(index)} images are others than {', '.join(paths)} was made of, by their sizes: "
        f"{name_rows(root, rows)}"
    )


def refuse_changed(rows: Sequence[int], what: str, unit_of: Callable[[int], int], units: Mapping[int, object]) -> None:
    """Raise UserError when a changed image is in a unit that is to be done."""
    if any(unit_of(row) in units for row in rows):
        raise UserError(f"{what}; put the images back, or encode into another STORE")


def _crcs(source: Source, index: Index, rows: Sequence[int]) -> dict[int, int]:
    """Checksums of the bytes that lie there now, of those rows that can be read."""
    crcs = {}
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        locations = index.table["location"].take(part).to_pylist()
        for row, sample in zip(part, source.read_many(locations), strict=True):
            if not isinstance(sample, Unreadable):
                crcs[row] = sample_crc32c(sample)
    return crcs
