"""Identity: everything that determines a group's numbers, and a digest of it that decides reuse.

Two runs with equal identities write equal arrays, so work is skipped exactly when digests agree. What may change
without changing a number (paths, host names, times, batch size) is provenance and stays out. The digest is SHA-256 over
canonical JSON: sorted keys, no spaces, UTF-8, no NaN.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from storage.base.errors import StoreError


def canonical_json(value: Any) -> str:
    """JSON in the one spelling that is hashed; raises ValueError for NaN and TypeError for what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `identity`."""
    return hashlib.sha256(canonical_json(dict(identity)).encode()).hexdigest()


def differing_fields(
    wanted: Mapping[str, Any],
    found: Mapping[str, Any],
    verbs: tuple[str, str] = ("found", "asked for"),
    prefix: str = "",
) -> list[str]:
    """One "field: found X, asked for Y" a leaf that differs, in key order; nested mappings are dotted."""
    lines = []
    for key in sorted({*wanted, *found}):
        a, b = wanted.get(key), found.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, verbs, f"{prefix}{key}.")
        elif canonical_json(a) != canonical_json(b):
            lines.append(f"{prefix}{key}: {verbs[0]} {_short(b)}, {verbs[1]} {_short(a)}")
    return lines


def require_same(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str, fix: str) -> None:
    """Raise StoreError naming every field in which `found` differs from `wanted`; `fix` ends the sentence."""
    lines = differing_fields(wanted, found)
    if lines:
        raise StoreError(f"{what} was made differently ({'; '.join(lines)}); {fix}")


def _short(value: Any) -> str:
    text = "nothing" if value is None else canonical_json(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
