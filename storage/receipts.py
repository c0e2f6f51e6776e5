"""Receipts: which unit of which group has been written, what failed in it, and the checksums of what was written.

A unit is done if and only if its receipt is there, carries the group's identity digest, and every file it names has the
size it names. A receipt is published after the files it speaks of, so a crash leaves a unit either done or to be done
again, never in between. One JSON file a unit below `receipts/<group>/`; reading them costs one small file a unit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import StoreError
from storage.files import write_atomic
from storage.layout import FORMAT_VERSION, GroupLayout


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sample that could not be decoded: its row, its key, and why. Its row is left empty in every array."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard file: path below the group, bytes, and the CRC-32C of each chunk slot in order (0 where empty)."""

    path: str
    nbytes: int
    chunk_crc32c: str  # base64 of uint32 little-endian (S·V,)

    @staticmethod
    def pack(crcs: np.ndarray) -> str:
        """Base64 of checksums uint32 (S·V,)."""
        return base64.b64encode(np.ascontiguousarray(crcs, dtype="<u4").tobytes()).decode()

    def crcs(self) -> np.ndarray:
        """The checksums, uint32 (S·V,)."""
        return np.frombuffer(base64.b64decode(self.chunk_crc32c), dtype="<u4")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one unit wrote."""

    identity_digest: str
    unit: int
    rows: tuple[int, int]  # [start, stop)
    shards: tuple[ShardRecord, ...]
    failed: tuple[Failure, ...]
    timings_s: dict[str, float]
    format_version: int = FORMAT_VERSION

    @property
    def n_done(self) -> int:
        """Rows written."""
        return self.rows[1] - self.rows[0] - len(self.failed)


def write_receipt(root: Path, layout: GroupLayout, receipt: Receipt, run_id: str) -> None:
    """Publish the unit's receipt; the files it names must be published already."""
    write_atomic(root / layout.receipt_key(receipt.unit), json.dumps(asdict(receipt), indent=1).encode(), run_id)


def read_receipt(root: Path, layout: GroupLayout, unit: int) -> Receipt | None:
    """The unit's receipt, or None when there is none. Raises StoreError when it cannot be understood."""
    path = root / layout.receipt_key(unit)
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        if fields["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"receipt {path} has format version {fields['format_version']}, this code {FORMAT_VERSION}"
            )
        return Receipt(
            identity_digest=fields["identity_digest"],
            unit=fields["unit"],
            rows=tuple(fields["rows"]),
            shards=tuple(ShardRecord(**shard) for shard in fields["shards"]),
            failed=tuple(Failure(**failure) for failure in fields["failed"]),
            timings_s=fields["timings_s"],
        )
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"receipt {path} is damaged ({error!r}); delete it and run precompute again") from error


def why_not_done(root: Path, layout: GroupLayout, unit: int, digest: str, receipt: Receipt | None) -> str | None:
    """None when the unit is done, else the reason in words: no receipt, another identity, or a file absent or short."""
    if receipt is None:
        return "no receipt"
    if receipt.identity_digest != digest:
        return f"its receipt is of identity {receipt.identity_digest[:12]}, the group's is {digest[:12]}"
    rows = layout.store.unit_rows(unit)
    if receipt.unit != unit or receipt.rows != (rows.start, rows.stop):
        return f"its receipt is of unit {receipt.unit}, rows {receipt.rows}"
    for shard in receipt.shards:
        path = root / layout.path / shard.path
        try:
            nbytes = path.stat().st_size
        except FileNotFoundError:
            return f"{path} is missing"
        if nbytes != shard.nbytes:
            return f"{path} has {nbytes} bytes, its receipt says {shard.nbytes}"
    return None


def scan(root: Path, layout: GroupLayout, digest: str) -> Iterator[tuple[int, Receipt | None, str | None]]:
    """(unit, receipt, reason it is not done or None) for every planned unit, in order.

    A damaged receipt counts as not done here, so that running precompute again heals it.
    """
    for unit in range(layout.store.n_units):
        try:
            receipt = read_receipt(root, layout, unit)
        except StoreError as error:
            yield unit, None, str(error)
            continue
        yield unit, receipt, why_not_done(root, layout, unit, digest, receipt)
