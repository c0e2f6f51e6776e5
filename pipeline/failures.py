"""`failures.parquet`: every image of a store that could not be decoded, with its reason, beside `index.parquet`.

A view of the receipts, written when a run ends, however it ends; so it is whole, and as new as the last run. Nothing
reads it but people and their tools: what a row is worth is said by the receipts alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from storage.index import Index
from storage.layout import GroupLayout
from storage.receipts import Failure, scan
from storage.roots import Root

FAILURES_FILE = "failures.parquet"
SCHEMA = pa.schema([("row", pa.int64()), ("key", pa.string()), ("location", pa.string()), ("reason", pa.string())])
MIN_FAILURES_ALLOWED = 10


def allowed_failures(share: float, n_images: int) -> int:
    """How many images may fail before the run is ended: the share, but a handful in any data set."""
    return max(MIN_FAILURES_ALLOWED, int(share * n_images))


def write_failures(
    root: Root, groups: Iterable[GroupLayout], digests: Mapping[str, str], index: Index, run_id: str
) -> int:
    """Write the failures that the groups' receipts name, one line an image, by row; returns how many."""
    failures: dict[int, Failure] = {}
    for layout in groups:
        for _, receipt, reason in scan(root, layout, digests[layout.path]):
            if receipt is not None and reason is None:
                failures |= {failure.row: failure for failure in receipt.failed}
    rows = sorted(failures)
    table = pa.table(
        {
            "row": rows,
            "key": [failures[row].key for row in rows],
            "location": index.table["location"].take(rows) if rows else [],
            "reason": [failures[row].reason for row in rows],
        },
        schema=SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    root.write(FAILURES_FILE, [buffer.getvalue()], run_id)
    return len(rows)
