"""docs/store-format.md is enough to read a store: its own reader, taken from the page, agrees with the project's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import open_store
from storage.codecs import CODECS
from tests.stores import make_store

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the page's last block of Python defines."""
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1], str(PAGE), "exec"), names)
    return names


def test_the_pages_reader_reads_what_the_project_reads(shared_tiny_store: Path, reader: dict[str, Any]) -> None:
    store = open_store(shared_tiny_store)
    for path in store.groups():
        group = store.group(path)
        for name, array in group.arrays.items():
            for row in range(store.n_rows):
                mine = np.empty((1, *array.row_shape), array.dtype)
                array.read_into(np.array([row]), 0, mine)
                assert np.array_equal(reader["read_row"](shared_tiny_store, path, name, row), mine[0])


@pytest.mark.parametrize("spelling", list(CODECS))
@pytest.mark.parametrize("width", [24, 80])
def test_the_pages_reader_decodes_what_the_project_decodes(
    tmp_path: Path, reader: dict[str, Any], spelling: str, width: int
) -> None:
    make_store(tmp_path, n_rows=3, n_views=2, width=width, codec=CODECS[spelling], failed_rows=[1])
    group = open_store(tmp_path).group("features/tiny-vit")
    for view in (0, 1):
        mine = group.tokens([0, 2], view)
        for row, tokens in zip((0, 2), mine, strict=True):
            theirs = reader["read_tokens"](tmp_path, "features/tiny-vit", row, view)
            np.testing.assert_allclose(tokens, theirs, rtol=1e-5, atol=1e-5)
    assert reader["read_tokens"](tmp_path, "features/tiny-vit", 1) is None
    group.close()


def test_the_pages_reader_finds_damage(tmp_path: Path, reader: dict[str, Any]) -> None:
    make_store(tmp_path)
    array = open_store(tmp_path).group("latents/tiny-vae")["moments"]
    assert reader["read_row"](tmp_path, "latents/tiny-vae", "moments", 0) is not None
    shard = next((tmp_path / "latents/tiny-vae/moments/c/0").rglob("0/0/0/0"))
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(AssertionError):
        reader["read_row"](tmp_path, "latents/tiny-vae", "moments", 0)
    array.close()
