"""`verify` sees what fields of a store say against each other, though every receipt was sealed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.verify import verify
from tests.storage import edits
from tests.stores import FEATURES, LATENTS, make_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "store")
    return tmp_path / "store"


def change_identity(root: Path, group: str, **fields: Any) -> None:
    path = root / group / "zarr.json"
    node = json.loads(path.read_bytes())
    node["attributes"]["identity"] |= fields
    path.write_text(json.dumps(node))
    edits.reseal(root)


def change_index(root: Path, name: str, values: list[Any]) -> None:
    path = root / "index.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)
    edits.reseal(root)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        (LATENTS, "kind", "features"),
        (FEATURES, "kind", "latents"),
        (FEATURES, "resolution", 512),
        (LATENTS, "views", ["original", "hflip"]),
        (LATENTS, "index_digest", "0" * 64),
    ],
)
def test_an_identity_against_its_store(store: Path, group: str, field: str, value: Any) -> None:
    assert list(verify(store)) == []
    change_identity(store, group, **{field: value})
    (fault,) = verify(store)
    assert f"{group}: its identity says {field}" in fault


def test_labels_and_keys_of_the_index(store: Path) -> None:
    table = pq.read_table(store / "index.parquet")
    labels = table["label"].to_pylist()
    change_index(store, "label", [-5, *labels[1:]])
    assert any("row 0 has label -5" in fault for fault in verify(store))
    change_index(store, "label", labels)
    keys = table["key"].to_pylist()
    change_index(store, "key", [keys[1], *keys[1:]])
    assert list(verify(store)) == []
    faults = list(verify(store, deep=True))
    assert any(f"{len(keys) - 1} different keys in {len(keys)} rows" in fault for fault in faults)
    assert any("is not the index that the store was made of" in fault for fault in faults)
