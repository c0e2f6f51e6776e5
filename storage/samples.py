"""Row i means the same bytes in every group: what each unit was made of, compared with what its other groups were.

A receipt has the CRC-32C of each sample's bytes as they were read (`Receipt.sample_crc32c`): of the encoded image, or
of the pixels where the source hands out pixels. A row that was stored in one group is made of the same bytes in all of
them, and stays so: another encoder's pass, or a unit done again, whose bytes differ in such a row is refused. A row
that failed stores nothing, so its bytes may be mended; each group takes them when it does the unit again.

Receipts of before, and of imported groups, have no checksums: nothing is known of their rows, and nothing is refused.
Cost: a CRC-32C pass of the encoded bytes, 4/3 · 4 bytes a row and group.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from crc32c import crc32c

from storage.base.errors import StoreError
from storage.base.shown import shown
from storage.index import read_index
from storage.layout import GROUP_KINDS, METADATA, RECEIPTS_DIR, GroupLayout
from storage.receipts import Failure, Receipt, read_receipt, scan
from storage.roots import Root

UNREAD = 0  # the checksum of what cannot be read, and of an empty file: both have failed
NAMED = 3  # rows in a message
REDO = "mend them and run the same precompute with --redo-failed (make: add it to ARGS)"

Group = tuple[GroupLayout, str]  # and its identity digest


def sample_crc32c(sample: bytes | np.ndarray) -> int:
    """The checksum of a sample's bytes, encoded or pixels."""
    return crc32c(sample if isinstance(sample, bytes) else np.ascontiguousarray(sample).data)


def stored_samples(receipt: Receipt) -> tuple[np.ndarray, np.ndarray]:
    """(checksums uint32 (n,), which of them are of rows that are stored, bool (n,)); none are where it has none."""
    n_rows = receipt.rows[1] - receipt.rows[0]
    crcs = receipt.sample_crcs()
    if crcs is None:
        return np.zeros(n_rows, dtype=np.uint32), np.zeros(n_rows, dtype=bool)
    stored = np.ones(n_rows, dtype=bool)
    stored[[failure.row - receipt.rows[0] for failure in receipt.failed]] = False
    return crcs, stored


def group_paths(root: Root) -> list[str]:
    """The groups that there are, by their folders' names."""
    return [f"{kind}/{name}" for kind in GROUP_KINDS for name in root.children(kind) if _is_name(name)]


def _is_name(name: str) -> bool:
    return not name.startswith(".") and name != METADATA


def refuse_other_samples(root: Root, paths: Sequence[str], unit: int, crcs: np.ndarray, failed: Sequence[int]) -> None:
    """Raise StoreError when a row that is stored in one of the groups was made of other bytes than those of `crcs`.

    `crcs` uint32 (n,) of the unit's rows, of which `failed` could not be decoded now: what cannot be read (UNREAD)
    cannot differ. Receipts that are not there, damaged or of other rows say nothing.
    """
    for path in paths:
        try:
            receipt = read_receipt(root, GroupLayout(path=path, arrays=()), unit)
        except StoreError:
            continue  # its unit counts as not done
        if receipt is None or receipt.rows[1] - receipt.rows[0] != len(crcs):
            continue
        theirs, stored = stored_samples(receipt)
        unread = np.zeros(len(crcs), dtype=bool)
        unread[[row - receipt.rows[0] for row in failed]] = True
        others = np.flatnonzero((theirs != crcs) & stored & ~(unread & (crcs == UNREAD)))
        if len(others):
            rows = [receipt.rows[0] + int(i) for i in others]
            fix = HEAL_SAMPLES.format(receipts=shlex.quote(root.at(RECEIPTS_DIR)), unit=unit)
            raise StoreError(
                f"{len(rows)} of {len(crcs)} images of unit {unit} are others than {root.at(path)} was made of: "
                f"{name_rows(root, rows)}; {fix}"
            )


def is_of_samples(receipt: Receipt | None, crcs: np.ndarray | None, failed: Sequence[Failure]) -> bool:
    """Whether doing the unit again would change nothing: the same bytes, and the same rows failed."""
    before = receipt.sample_crcs() if receipt is not None else None
    if receipt is None or before is None or crcs is None:
        return False
    return np.array_equal(before, crcs) and {f.row for f in receipt.failed} == {f.row for f in failed}


def refuse_lost_rows(root: Root, path: str, receipt: Receipt, failed: Sequence[Failure]) -> None:
    """Raise StoreError when a unit that is done again would lose a row that it has stored."""
    lost = sorted({failure.row for failure in failed} - {failure.row for failure in receipt.failed})
    if lost:
        reason = next(failure.reason for failure in failed if failure.row == lost[0])
        raise StoreError(
            f"{len(lost)} images that {root.at(path)} has stored cannot be decoded now: {name_rows(root, lost)} "
            f"({shown(reason)}); put them back, unit {receipt.unit} was left as it is"
        )


HEAL_SAMPLES = (
    "put the images back, encode into another STORE, or remove {receipts}/*/*/{unit:08d}.json to encode the unit anew "
    "in every group"
)


def name_rows(root: Root, rows: Sequence[int]) -> str:
    """The first rows with their keys, and how many more."""
    try:
        keys = read_index(root).table["key"].take(list(rows[:NAMED])).to_pylist()
    except (StoreError, IndexError):
        keys = ["?"] * len(rows[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(f"row {row} ({shown(key)})" for row, key in zip(rows, keys, strict=False)) + more


def disagreements(root: Root, groups: Mapping[str, Group]) -> Iterator[str]:
    """One line for every unit and pair of groups whose rows, stored in both, were made of different bytes.

    Each group is compared with the first that knows the row. Memory does not grow with the units.
    """
    if len(groups) < 2:
        return
    paths = list(groups)
    for scans in zip(*(scan(root, *group) for group in groups.values()), strict=True):
        first = np.zeros(0, dtype=np.uint32)  # checksums by row of the unit
        owner = np.zeros(0, dtype=np.int64)  # which group they are of, −1: none yet
        for position, (unit, receipt, reason) in enumerate(scans):
            if receipt is None or reason is not None:
                continue  # said by whoever scans
            crcs, stored = stored_samples(receipt)
            if not len(first):
                first, owner = np.zeros_like(crcs), np.full(len(crcs), -1)
            new = stored & (owner < 0)
            first, owner = np.where(new, crcs, first), np.where(new, position, owner)
            differs = stored & (crcs != first)
            for other in np.unique(owner[differs]).tolist():
                rows = [receipt.rows[0] + int(i) for i in np.flatnonzero(differs & (owner == other))]
                yield (
                    f"{root.at(paths[position])}: unit {unit}: {len(rows)} rows were made of other images than those "
                    f"of {paths[other]}: {name_rows(root, rows)}; remove the receipt of the one whose images are wrong "
                    "and run precompute again"
                )
