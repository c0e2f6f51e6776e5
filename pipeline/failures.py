"""`failures.parquet`: every image of a store that could not be decoded, with its reason, beside `index.parquet`.

A view of the receipts of all groups, written when a run ends, however it ends; so it is whole, and as new as the last
run. Nothing reads it but people and their tools: what a row is worth is said by the receipts alone, and so is whether
too many have failed, in this run or in any before.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from storage.base.errors import UserError
from storage.index import Index
from storage.receipts import Failure, scan
from storage.roots import Root
from storage.samples import REDO, Group

FAILURES_FILE = "failures.parquet"
SCHEMA = pa.schema([("row", pa.int64()), ("key", pa.string()), ("location", pa.string()), ("reason", pa.string())])
MIN_FAILURES_ALLOWED = 10


def allowed_failures(share: float, n_images: int) -> int:
    """How many images may fail before the run is ended: the share, but a handful in any data set."""
    return max(MIN_FAILURES_ALLOWED, int(share * n_images))


def refuse_too_many(n_failed: int, n_images: int, share: float, root: Root) -> None:
    """Raise UserError when more images of a store have failed than are allowed, whichever run it was that met them."""
    allowed = allowed_failures(share, n_images)
    if n_failed > allowed:
        raise UserError(
            f"{n_failed} of {n_images} images cannot be decoded, {allowed} are allowed; {root.at(FAILURES_FILE)} says "
            f"which and why: {REDO}, or raise --max-failures"
        )


def write_failures(root: Root, groups: Iterable[Group], index: Index, run_id: str) -> tuple[int, int]:
    """Write the failures that the groups' receipts name, one line an image, by row.

    Returns (how many there are, how many of those no group has stored: what the limit counts).
    """
    failures: dict[int, Failure] = {}
    times: Counter[int] = Counter()
    n_groups: Counter[int] = Counter()  # unit → groups that have it
    unit_of: dict[int, int] = {}
    for layout, digest in groups:
        for unit, receipt, reason in scan(root, layout, digest):
            if receipt is not None and reason is None:
                n_groups[unit] += 1
                failures |= {failure.row: failure for failure in receipt.failed}
                times.update(failure.row for failure in receipt.failed)
                unit_of |= {failure.row: unit for failure in receipt.failed}
    rows = sorted(failures)
    table = pa.table(
        {
            "row": rows,
            "key": [failures[row].key for row in rows],
            "location": index.table["location"].take(rows) if rows else [],
            "reason": [failures[row].reason for row in rows],
        },
        schema=SCHEMA.with_metadata({"summary": f"{len(rows)} images failed; {REDO}"} if rows else None),
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    root.write(FAILURES_FILE, [buffer.getvalue()], run_id)
    return len(rows), sum(n == n_groups[unit_of[row]] for row, n in times.items())
