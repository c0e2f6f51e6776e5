"""Receipts: which unit of which group has been written, what failed in it, and the checksums of what was written.

A unit is done if and only if its receipt is there, carries the group's identity digest, and every file it names has the
size it names. A receipt is published after the files it speaks of, so a crash leaves a unit either done or to be done
again, never in between; one that is done again is first taken back, by a receipt that names no shard. One JSON file a
unit below `receipts/<group>/`; reading them costs one small file a unit.

A receipt also has the CRC-32C of the bytes that each row was made of (`sample_crc32c`), by which groups are held
together: `samples.py`. It is optional: receipts of before and of imported groups have none.

Metadata has receipts too: `receipts/store.json` holds the SHA-256 of the root's metadata and index, and
`receipts/<group>/metadata.json` those of the group's, so that an edited attribute is found before a number is read.
Every receipt ends in the SHA-256 of the rest of itself, and any other spelling of the same JSON is refused: no byte of
a receipt can change unseen.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import Any, TypeVar, cast

import numpy as np
from crc32c import crc32c
from pydantic import FiniteFloat

from storage.base.boundary import parse_json
from storage.base.errors import StoreError
from storage.base.programs import as_called, program
from storage.base.shown import LONGEST
from storage.layout import (
    ANOTHER_VERSION,
    FORMAT_VERSION,
    GROUP_KINDS,
    INDEX_FILE,
    METADATA,
    RECEIPTS_DIR,
    STORE_RECEIPT,
    GroupLayout,
)
from storage.metadata import read_attributes
from storage.roots import Root
from storage.schema import Base64, Count, Made, MetadataReceipt, PackedSums, Row, Version

T = TypeVar("T")
SCAN_AHEAD = 256  # receipts read ahead of the one that is looked at


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sample that could not be decoded: its row, its key, and why. Its row is left empty in every array."""

    row: Row
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard file: path below the group, bytes, and the CRC-32C of each chunk slot in order (0 where empty)."""

    path: str
    nbytes: Count
    chunk_crc32c: Base64  # of uint32 little-endian (S·V,)

    @staticmethod
    def pack(crcs: np.ndarray) -> str:
        """Base64 of checksums uint32 (S·V,)."""
        return base64.b64encode(np.ascontiguousarray(crcs, dtype="<u4").tobytes()).decode()

    def has_crcs(self, n: int) -> bool:
        """Whether there are n checksums, told without decoding them."""
        padding = -4 * n % 3
        text = self.chunk_crc32c
        return len(text) == (4 * n + padding) // 3 * 4 and len(text.rstrip("=")) == len(text) - padding

    def crcs(self) -> np.ndarray:
        """The checksums, uint32 (S·V,)."""
        return np.frombuffer(base64.b64decode(self.chunk_crc32c), dtype="<u4")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one unit wrote, and the type of its file: a field that is added has a default, for receipts without it."""

    identity_digest: str
    unit: Count
    rows: tuple[Row, Count]  # [start, stop)
    shards: tuple[ShardRecord, ...]
    failed: tuple[Failure, ...]
    timings_s: dict[str, FiniteFloat]
    statistics: dict[str, PackedSums] = field(default_factory=dict)  # `storage.statistics`; {} in imported stores
    made: Made = field(default_factory=Made)  # when, by which run, on what device, in what batches; `writer`
    sample_crc32c: Base64 = ""  # of uint32 little-endian (n,), of each sample's bytes; "" in receipts of before
    format_version: int = FORMAT_VERSION

    @property
    def n_done(self) -> int:
        """Rows written."""
        return self.rows[1] - self.rows[0] - len(self.failed)

    def shard(self, array: str) -> ShardRecord | None:
        """The record of the named array's shard."""
        return next((shard for shard in self.shards if shard.path.startswith(f"{array}/")), None)

    def is_of(self, rows: range) -> bool:
        """Whether it is of these rows, its failures too."""
        return self.rows == (rows.start, rows.stop) and all(failure.row in rows for failure in self.failed)

    def sample_crcs(self) -> np.ndarray | None:
        """CRC-32C of each row's bytes as they were read, uint32 (n,), 0 where they could not be; None: not recorded.

        Raises ValueError when they are not n; a receipt that was read has been asked.
        """
        if not self.sample_crc32c:
            return None
        crcs = np.frombuffer(base64.b64decode(self.sample_crc32c, validate=True), dtype="<u4")
        if len(crcs) != self.rows[1] - self.rows[0]:
            raise ValueError(f"sample_crc32c is of {len(crcs)} rows")
        return crcs


def rows_crc32c(receipt: Receipt) -> int:
    """CRC-32C of the checksums of a unit's chunks, which stand for its bytes and for which rows have failed."""
    crc = 0
    for shard in sorted(receipt.shards, key=lambda shard: shard.path):
        crc = crc32c(shard.chunk_crc32c.encode(), crc)
    return crc


def sha256(data: bytes) -> str:
    """SHA-256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def seal(fields: Mapping[str, Any]) -> bytes:
    """The one spelling of a receipt: indented JSON whose last field is the SHA-256 of the rest in that spelling."""
    body = json.dumps(dict(fields), indent=1).encode()
    return body.removesuffix(CLOSING) + _signature(body)


def unseal(kind: type[T], raw: bytes, where: str) -> T:
    """A sealed receipt as an object of `kind`. Raises StoreError when a byte is not as written, or a field is none."""
    body = raw[:-SIGNATURE_BYTES] + CLOSING
    if raw[-SIGNATURE_BYTES:] != _signature(body):
        raise StoreError(f"receipt {where} is damaged (it is not as it was written); {HEAL_RECEIPT}")
    what = f"receipt {where}"
    try:
        receipt: Any = parse_json(kind, body, what, HEAL_RECEIPT)
    except StoreError:
        _require_version(parse_json(Version, body, what, HEAL_RECEIPT), where)
        raise
    _require_version(receipt, where)
    return cast(T, receipt)


def _require_version(receipt: Any, where: str) -> None:
    if receipt.format_version != FORMAT_VERSION:
        raise StoreError(
            f"receipt {where} has format version {receipt.format_version}, not {FORMAT_VERSION}; {ANOTHER_VERSION}"
        )


def _signature(body: bytes) -> bytes:
    """How a receipt ends whose other fields are `body`; checked without spelling those again, which took most of it."""
    return b',\n "sha256": "' + sha256(body).encode() + b'"' + CLOSING


CLOSING = b"\n}"
SIGNATURE_BYTES = len(_signature(b""))
HEAL_RECEIPT = "delete it and run precompute again"


def write_receipt(root: Root, layout: GroupLayout, receipt: Receipt, run_id: str, *, fsync: bool = True) -> None:
    """Publish the unit's receipt; the files it names must be published already."""
    root.write(layout.receipt_key(receipt.unit), [seal(asdict(receipt))], run_id, fsync=fsync)


def read_receipt(root: Root, layout: GroupLayout, unit: int) -> Receipt | None:
    """The unit's receipt, or None when there is none. Raises StoreError when it cannot be understood."""
    key = layout.receipt_key(unit)
    try:
        raw = root.read(key)
    except FileNotFoundError:
        return None
    receipt = unseal(Receipt, raw, root.at(key))
    try:
        receipt.sample_crcs()
    except ValueError as error:
        raise StoreError(f"receipt {root.at(key)} is damaged ({error}); {HEAL_RECEIPT}") from error
    return receipt


def write_metadata_receipt(root: Root, key: str, files: Mapping[str, bytes], run_id: str) -> None:
    """Publish the SHA-256 of metadata files (key → bytes) at `key`."""
    fields = {"format_version": FORMAT_VERSION, "files": {name: sha256(raw) for name, raw in sorted(files.items())}}
    root.write(key, [seal(fields)], run_id)


def check_metadata(root: Root, key: str, *, only: str = "") -> tuple[list[str], list[str]]:
    """(the metadata files that the receipt at `key` names, one line for each that is not as it says).

    `only` looks at one of them. Raises StoreError when there is no receipt.
    """
    try:
        receipt = unseal(MetadataReceipt, root.read(key), root.at(key))
    except FileNotFoundError:
        fix = f"run the same `{_maker_of(root, key)}` again to restore it"
        raise StoreError(f"receipt {root.at(key)} is missing; {fix}") from None
    stray = [name for name in receipt.files if not _is_metadata_of(name, key)]
    if stray or (only and only not in receipt.files):
        wrong = f"it speaks of {stray[0][:60]!r}" if stray else f"it does not speak of {only}"
        raise StoreError(f"receipt {root.at(key)} is damaged ({wrong}); {HEAL_RECEIPT}")
    faults = []
    for name, digest in receipt.files.items():
        if only not in ("", name):
            continue
        try:
            if name == INDEX_FILE:
                with root.open(name) as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                actual = sha256(root.read(name))
            if actual != digest:
                faults.append(f"{root.at(name)} was edited since it was written: its SHA-256 is not its receipt's")
        except FileNotFoundError:
            faults.append(f"{root.at(name)} is missing")
        except StoreError as error:
            faults.append(str(error))
    return list(receipt.files), faults


def maker(attributes: Mapping[str, Any]) -> str:
    """The command that a group of these attributes was made by, and is finished by."""
    identity = attributes.get("identity")
    if not isinstance(identity, Mapping) or not identity.get("derived_from"):
        return as_called("make precompute")
    provenance = attributes.get("provenance")
    parent = provenance.get("derived_from") if isinstance(provenance, Mapping) else None
    return f"{program('storage')} derive STORE {str(parent or 'GROUP')[:LONGEST]} …"


def _maker_of(root: Root, key: str) -> str:
    """`maker` of the group, or the store, that the receipt at `key` is of, whose metadata nothing vouches for."""
    path = key.removeprefix(f"{RECEIPTS_DIR}/").rpartition("/")[0]
    try:
        return maker((read_attributes(root, f"{path}/{METADATA}") if path else None) or {})
    except StoreError:
        return maker({})


def _is_metadata_of(name: str, key: str) -> bool:
    """Whether a metadata receipt at `key` may speak of the file `name`: no receipt makes us open any other."""
    if key == STORE_RECEIPT:
        return name in (METADATA, INDEX_FILE, *(f"{kind}/{METADATA}" for kind in GROUP_KINDS))
    group = key.removeprefix(f"{RECEIPTS_DIR}/").rpartition("/")[0]
    array, _, last = name.removeprefix(f"{group}/").rpartition("/")
    return name.startswith(f"{group}/") and last == METADATA and (not array or ("/" not in array and array[0] != "."))


def why_not_done(
    root: Root, layout: GroupLayout, unit: int, digest: str, receipt: Receipt | None, sizes: Mapping[str, int] | None
) -> str | None:
    """None when the unit is done, else the reason in words: no receipt, another identity, or a file absent or short.

    `sizes` are the bytes of the group's files by key, or None to ask for each.
    """
    if receipt is None:
        return "no receipt"
    if receipt.identity_digest != digest:
        return f"its receipt is of identity {receipt.identity_digest[:12]}, the group's is {digest[:12]}"
    rows = layout.store.unit_rows(unit)
    if receipt.unit != unit or receipt.rows != (rows.start, rows.stop):
        return f"its receipt is of unit {receipt.unit}, rows {receipt.rows}"
    if not receipt.shards:
        return "it was begun again and not finished"  # `writer.publish_unit` says so before it replaces a shard
    wanted = [f"{array.name}/{array.shard_key(unit)}" for array in layout.arrays]
    if sorted(shard.path for shard in receipt.shards) != sorted(wanted):
        named = [shard.path[:LONGEST] for shard in receipt.shards[: len(wanted) + 1]]
        return f"its receipt is of the files {named}, not {wanted}"
    damage = _damage(layout, receipt)
    if damage is not None:
        return f"its receipt is damaged ({damage}); {HEAL_RECEIPT}"
    for shard in receipt.shards:
        key = f"{layout.path}/{shard.path}"
        try:
            nbytes = root.size(key) if sizes is None else sizes.get(key)
        except FileNotFoundError:
            nbytes = None
        except StoreError as error:
            return str(error)
        if nbytes is None:
            return f"{root.at(key)} is missing"
        if nbytes != shard.nbytes:
            return f"{root.at(key)} has {nbytes} bytes, its receipt says {shard.nbytes}"
    return None


def _damage(layout: GroupLayout, receipt: Receipt) -> str | None:
    """In what a receipt of the right unit and files contradicts itself or the layout, or None."""
    failed = [receipt.rows[0] - 1, *(failure.row for failure in receipt.failed), receipt.rows[1]]
    if any(a >= b for a, b in pairwise(failed)):
        return f"the failed rows are not rows of {receipt.rows}, in order"
    for array in layout.arrays:
        shard = receipt.shard(array.name)
        assert shard is not None  # its files were compared before
        if not shard.has_crcs(array.n_shard_chunks):
            return f"{shard.path} should have {array.n_shard_chunks} checksums"
        nbytes = receipt.n_done * array.store.n_views * array.stored_bytes + array.index_bytes
        if shard.nbytes != nbytes:
            return f"{receipt.n_done} rows make {nbytes} bytes of {shard.path}, not {shard.nbytes}"
    return None


def look_at(root: Root, layout: GroupLayout, unit: int, digest: str) -> tuple[Receipt | None, bool]:
    """(the unit's receipt, None when it is damaged or not there; whether the unit is done at this moment)."""
    try:
        receipt = read_receipt(root, layout, unit)
    except StoreError:
        return None, False
    return receipt, why_not_done(root, layout, unit, digest, receipt, None) is None


def scan(root: Root, layout: GroupLayout, digest: str) -> Iterator[tuple[int, Receipt | None, str | None]]:
    """(unit, receipt, reason it is not done or None) for every planned unit, in order, some read ahead.

    A damaged receipt counts as not done here, so that running precompute again heals it. Memory does not grow with the
    units, unless the caller keeps what it is given.
    """
    sizes = root.sizes(layout.path)

    def look(unit: int) -> tuple[int, Receipt | None, str | None]:
        try:
            receipt = read_receipt(root, layout, unit)
        except StoreError as error:
            return unit, None, str(error)
        return unit, receipt, why_not_done(root, layout, unit, digest, receipt, sizes)

    n_units = layout.store.n_units
    if root.path is not None and n_units < SCAN_AHEAD:
        yield from map(look, range(n_units))
        return
    n_run = SCAN_AHEAD // root.concurrency  # a future for every receipt would cost as much as reading it
    runs = (range(start, min(start + n_run, n_units)) for start in range(0, n_units, n_run))
    with ThreadPoolExecutor(root.concurrency, thread_name_prefix="receipts") as pool:
        while ahead := list(islice(runs, root.concurrency)):
            for found in pool.map(lambda run: list(map(look, run)), ahead):
                yield from found
