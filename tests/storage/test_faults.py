"""Any damage to any file of a store: `verify --deep` names it, and no read returns a wrong number.

Each occasion damages a good store in one random way, asks, and mends it again. 500 occasions in `make test-all`, a
tenth of them in `make test`; each prints its seed when it fails.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage import StoreError, open_store
from storage.verify import _finite, verify
from tests.stores import FEATURES, LATENTS, make_store

N_ROWS, SHARD_ROWS, FAILED = 44, 16, [5, 33]
Data = dict[str, dict[str, np.ndarray]]
# What a damage returns: the files (below the root) of which one must be named, and whether rows must be named too.


def flip_a_bit(root: Path, rng: np.random.Generator) -> list[Path]:
    path = rng.choice(np.array(all_files(root)))
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)
    return [path]


def truncate(root: Path, rng: np.random.Generator) -> list[Path]:
    path = rng.choice(np.array(all_files(root)))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(rng.integers(len(raw)))])
    return [path]


def swap_two_shards(root: Path, rng: np.random.Generator) -> list[Path]:
    array = root / [f"{LATENTS}/moments", f"{FEATURES}/patches", f"{FEATURES}/cls"][rng.integers(3)]
    shards = sorted(path for path in (array / "c").rglob("*") if path.is_file())
    a, b = rng.choice(np.array(shards), 2, replace=False)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return [a, b]


def delete_a_receipt(root: Path, rng: np.random.Generator) -> list[Path]:
    path = rng.choice(np.array(sorted((root / "receipts").rglob("*.json"))))
    path.unlink()
    return [path]


def edit_an_attribute(root: Path, rng: np.random.Generator) -> list[Path]:
    path = rng.choice(np.array(sorted(root.rglob("zarr.json"))))
    fields = json.loads(path.read_text())
    leaves = list(leaves_of(fields))
    holder, key = leaves[rng.integers(len(leaves))]
    old = holder[key]
    holder[key] = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x"
    path.write_text(json.dumps(fields, indent=2))
    return [path]


DAMAGES: list[Callable[[Path, np.random.Generator], list[Path]]] = [
    flip_a_bit,
    truncate,
    swap_two_shards,
    delete_a_receipt,
    edit_an_attribute,
]


def leaves_of(node: object) -> list[tuple[dict | list, object]]:  # type: ignore[type-arg]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    found = []
    for key, value in items:
        if isinstance(value, dict | list) and value:
            found += leaves_of(value)
        else:
            found.append((node, key))
    return found  # type: ignore[return-value]


def all_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def read_everything(root: Path, data: Data, policy: str, rng: np.random.Generator) -> str | None:
    """None when all that was read is right, else the error; a wrong number fails the test."""
    order = rng.permutation([row for row in range(N_ROWS) if row not in FAILED])
    try:
        store = open_store(root)
        for path, arrays in data.items():
            group = store.group(path, checksums=policy, n_threads=2)  # type: ignore[arg-type]
            assert group.failed_rows.tolist() == FAILED
            for name, written in arrays.items():
                out = np.empty((len(order), *written.shape[2:]), written.dtype)
                views = rng.integers(0, 2, len(order))
                group[name].read_into(order, views, out)
                np.testing.assert_array_equal(out, written[order, views])
            group.close()
    except StoreError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data]:
    root = tmp_path_factory.mktemp("faults") / "store"
    data = make_store(root, n_rows=N_ROWS, n_views=2, shard_rows=SHARD_ROWS, failed_rows=FAILED)
    return root, data


def inject(good: tuple[Path, Data], seed: int) -> None:
    root, data = good
    rng = np.random.default_rng(seed)
    damage = DAMAGES[seed % len(DAMAGES)]
    before = {path: path.read_bytes() for path in all_files(root)}
    damaged = damage(root, rng)
    about = f"seed {seed}: {damage.__name__} of {[str(path.relative_to(root)) for path in damaged]}"
    try:
        faults = list(verify(root, deep=True, n_workers=1))
        for path in damaged:
            unit = re.fullmatch(r"(\d{8})\.json", path.name)
            names = [str(path), *([f"unit {int(unit[1])}"] if unit else [])]
            assert any(name in fault for fault in faults for name in names), f"{about}: not named in {faults}"
        for policy in ("always", "first"):
            error = read_everything(root, data, policy, rng)
            if damage is swap_two_shards:
                # Sizes of whole shards are equal, so it is the checksums that tell.
                assert error is not None, about
                assert re.search(r"row \d+|bytes, its receipt says", error), f"{about}: {error}"
            elif damage is flip_a_bit and "/c/" in str(damaged[0]):
                if error is not None:  # a flip of the checksum beside a chunk changes no number
                    assert re.search(r"shard .*(row \d+, view \d|index)", error), f"{about}: {error}"
            else:
                quiet = damaged[0].name in ("index.parquet",) or damaged[0].parent.name in ("latents", "features")
                assert error is not None or quiet, f"{about}: read without a word"
    finally:
        for path, raw in before.items():
            path.write_bytes(raw)
    assert list(verify(root, deep=True, n_workers=1)) == [], about


@pytest.mark.parametrize("seed", range(15))
def test_damage_is_named_and_never_read(good: tuple[Path, Data], seed: int) -> None:
    inject(good, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15, 500))
def test_more_damage_is_named_and_never_read(good: tuple[Path, Data], seed: int) -> None:
    inject(good, seed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_named(tmp_path: Path, value: float) -> None:
    patches = make_store(tmp_path / "good")[FEATURES]["patches"]
    patches[23, 0, 7, 3] = value
    make_store(tmp_path / "s", features={"patches": patches})
    assert [line.partition("patches/")[2] for line in verify(tmp_path / "s", deep=True)] == [
        "c/1/0/0/0, row 23, view 0: NaN or infinity among its numbers"
    ]
    assert list(verify(tmp_path / "s")) == []  # that takes reading


@given(arrays(st.sampled_from(["f2", "f4", "f8"]), 5, elements=st.floats(allow_nan=True, width=16)))
def test_finite_is_numpys_isfinite(values: np.ndarray) -> None:
    assert _finite(values) == bool(np.isfinite(values).all())


@pytest.mark.parametrize("what", ["group", "metadata"])
def test_a_group_that_is_gone_is_named(tmp_path: Path, what: str) -> None:
    make_store(tmp_path)
    if what == "group":
        shutil.rmtree(tmp_path / FEATURES)
    else:
        (tmp_path / FEATURES / "zarr.json").unlink()
    faults = list(verify(tmp_path))
    assert len(faults) == 1
    assert f"{FEATURES}/zarr.json is missing; restore it, or remove {tmp_path}/receipts/{FEATURES} too" in faults[0]
    shutil.rmtree(tmp_path / "receipts" / FEATURES)
    assert list(verify(tmp_path)) == []


def test_a_shard_that_the_disk_does_not_give_is_named_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path)
    (tmp_path / FEATURES / "cls/c/2/0/0").write_bytes(b"short")
    pread = os.pread

    def failing(fd: int, n_bytes: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"{LATENTS}/moments/c/1/0/0/0/0") and offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, n_bytes, offset)

    monkeypatch.setattr(os, "pread", failing)
    faults = list(verify(tmp_path, deep=True, n_workers=1))
    assert f"shard {tmp_path}/{LATENTS}/moments/c/1/0/0/0/0 cannot be read: Input/output error" in faults
    assert [fault for fault in faults if "cls/c/2/0/0" in fault]


def test_files_that_belong_to_no_unit_are_named(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    shutil.copytree(root / FEATURES / "patches/c/0", root / FEATURES / "patches/c/7")
    shutil.copy(root / "receipts" / LATENTS / "00000000.json", root / "receipts" / LATENTS / "00000099.json")
    faults = list(verify(root))
    assert len(faults) == 2
    assert "00000099.json is no unit's receipt" in faults[0]
    assert "patches/c/7 is no shard of the store's 3 units" in faults[1]
