"""What a stranger can do to a store: an edit of every field of every JSON file, of every file, of every folder.

An edit is a function of the store's root. Whoever edits can also seal: `reseal` makes every receipt agree with the
files again, so that what is tested is what lies behind the seals.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from storage.codecs.int8 import INT8
from storage.identity import identity_digest
from storage.receipts import seal
from tests.stores import FEATURES, LATENTS, make_store

Edit = Callable[[Path], None]
STEERS = "\x1b]0;owned\x07\x1b[2J\u202e\u2028"  # sets a window's title, clears the screen, turns the text round
GONE = object()
N_ROWS, SHARD_ROWS = 20, 8
DEEP = json.loads("[" * 150 + "]" * 150)
VALUES: list[Any] = [
    GONE, None, True, -1, 0, 7, 1.5, 2**31 - 1, 10**15, 2**63, 10**400, float("nan"), float("inf"), "", "x", STEERS,
    "../../etc", "\ud800", "A" * 100_000, [], [1, "x"], [-1] * 3, [2**40] * 3, {}, {"a": {"b": [1]}}, DEEP,
]  # fmt: skip


def make_good(root: Path) -> None:
    """A store with quantised features, a failed row, and statistics in its receipts, as the pipeline writes them.

    Its images lie beside it.
    """
    images = root.with_name("images")
    for row in range(N_ROWS):
        path = images / f"class{row % 5}/{row:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((128, 128, 3), row * 10, np.uint8)).save(path)
    make_store(
        root,
        n_rows=N_ROWS,
        shard_rows=SHARD_ROWS,
        failed_rows=[3],
        codec=INT8,
        source={"kind": "image-folder", "path": str(images)},
        suffix=".png",
    )
    channels = {"moments": 8, "patches": 24, "patches.norm": 1, "cls": 24, "cls.norm": 1}
    for path in (root / "receipts").rglob("0*.json"):
        fields = read_fields(path)
        names = ["moments"] if LATENTS in str(path) else ["patches", "patches.norm", "cls", "cls.norm"]
        numbers = {name: base64.b64encode(np.full(channels[name], 9.0).tobytes()).decode() for name in names}
        fields["statistics"] = {
            name: {"count": 9, "sum": packed, "sum_squares": packed} for name, packed in numbers.items()
        }
        write_fields(path, fields)


def read_fields(path: Path) -> Any:
    fields = json.loads(path.read_bytes())
    if "receipts" in path.parts:
        fields.pop("sha256", None)
    return fields


def write_fields(path: Path, fields: Any) -> None:
    """As a receipt, sealed, or as metadata."""
    if "receipts" in path.parts and isinstance(fields, dict):
        path.write_bytes(seal(fields))
    else:
        path.write_text(json.dumps(fields))


def reseal(root: Path) -> None:
    """Make the receipts of metadata, and the digests of identities, agree with the files as they are now."""
    for group in (LATENTS, FEATURES):
        with contextlib.suppress(Exception):  # what is no longer JSON has no digest
            path = root / group / "zarr.json"
            node = json.loads(path.read_bytes())
            digest = identity_digest(node["attributes"]["identity"])
            if node["attributes"]["identity_digest"] != digest and len(node["attributes"]["identity_digest"]) == 64:
                node["attributes"]["identity_digest"] = digest
                path.write_text(json.dumps(node))
                for receipt in (root / "receipts" / group).glob("0*.json"):
                    write_fields(receipt, {**read_fields(receipt), "identity_digest": digest})
    for receipt in [root / "receipts/store.json", *(root / "receipts").glob("*/*/metadata.json")]:
        with contextlib.suppress(Exception):
            fields = read_fields(receipt)
            for name in fields["files"]:
                if (root / name).is_file():
                    fields["files"][name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
            write_fields(receipt, fields)


def json_files(root: Path) -> list[Path]:
    """One of each kind: the receipts of the first unit stand for the others."""
    return [path for path in sorted(root.rglob("*.json")) if path.name not in ("00000001.json", "00000002.json")]


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field and item below a node."""
    items = node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def set_field(name: str, place: tuple[Any, ...], value: Any) -> Edit:
    """Replace one field of one file, and seal."""

    def edit(root: Path) -> None:
        fields = read_fields(root / name)
        node = fields
        for key in place[:-1]:
            node = node[key]
        if value is GONE:
            del node[place[-1]]
        else:
            node[place[-1]] = value
        write_fields(root / name, fields)
        if path_is_metadata(name):
            reseal(root)

    return edit


def path_is_metadata(name: str) -> bool:
    return not name.startswith("receipts/") or name.endswith("store.json")


def field_edits(root: Path) -> list[tuple[str, Edit]]:
    """Every field of every JSON file, each with every value."""
    edits = []
    for path in json_files(root):
        name = str(path.relative_to(root))
        for place in places(read_fields(path)):
            for i, value in enumerate(VALUES):
                edits.append((f"{name} {'.'.join(map(str, place))} = value {i}", set_field(name, place, value)))
        for i, value in enumerate(VALUES[1:]):
            edits.append((f"{name} = value {i + 1}", _whole(name, value)))
    return edits


def _whole(name: str, value: Any) -> Edit:
    def edit(root: Path) -> None:
        write_fields(root / name, value)
        reseal(root)

    return edit


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        _remove(path)
        make(path)

    return edit


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 108 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def _renamed(path: Path) -> None:
    path.rename(path.with_name(STEERS))


FILE_EDITS: dict[str, Callable[[Path], None]] = {
    "removed": _remove,
    "empty": lambda path: path.write_bytes(b"") and None,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(max(64, path.stat().st_size))) and None,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more") and None,
    "sparse": lambda path: os.truncate(path, 1 << 33),
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "a socket": _replaced(_socket),
    "a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a terminal": _replaced(lambda path: path.symlink_to("/dev/tty")),
    "of /proc": _replaced(lambda path: path.symlink_to("/proc/self/maps")),
    "a circle": _replaced(lambda path: path.symlink_to(path.name)),
    "nowhere": _replaced(lambda path: path.symlink_to("nowhere")),
    "outside": _replaced(lambda path: path.symlink_to(__file__)),
    "Parquet": lambda path: pq.write_table(pa.table({"x": [1]}), path),
}


def file_edits(root: Path) -> list[tuple[str, Edit]]:
    """Every file, as it should not be; sealed where a seal can be made."""
    shards = sorted(path for path in root.glob("*/*/*/c/0/**/0") if path.is_file())
    edits = []
    for path in [*json_files(root), root / "index.parquet", *shards]:
        name = str(path.relative_to(root))
        for how, change in FILE_EDITS.items():
            if how == "sparse" and name == "index.parquet":
                continue  # its seal takes reading all of it, as long as the file is
            edits.append((f"{name}: {how}", _of_file(name, change)))
    for path in sorted(p for p in root.rglob("*") if p.is_dir()):
        name = str(path.relative_to(root))
        for how in ("removed", "a pipe", "a device", "a circle", "nowhere", "outside"):
            edits.append((f"{name}/: {how}", _of_file(name, FILE_EDITS[how])))
        edits.append((f"{name}/: a file", _of_file(name, _replaced(lambda path: path.write_bytes(b"{}")))))
        edits.append((f"{name}/: named to steer", _of_file(name, _renamed)))
    return edits


def _of_file(name: str, change: Callable[[Path], None]) -> Edit:
    def edit(root: Path) -> None:
        change(root / name)
        path = root / name
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30:
            reseal(root)

    return edit


def index_edits() -> list[tuple[str, Edit]]:
    """Other tables in place of the index, sealed."""
    n = N_ROWS
    good: dict[str, Any] = {
        "key": [f"k{i}" for i in range(n)], "label": [i % 5 for i in range(n)], "class_name": ["c"] * n,
        "location": ["l"] * n, "nbytes": [1] * n,
    }  # fmt: skip
    tables: dict[str, Any] = {
        "fewer rows": {name: values[:-1] for name, values in good.items()},
        "more rows": {name: [*values, values[0]] for name, values in good.items()},
        "no rows": pa.table({name: pa.array(values)[:0] for name, values in good.items()}),
        "labels of text": {**good, "label": ["x"] * n},
        "labels of fractions": {**good, "label": [0.5] * n},
        "keys of numbers": {**good, "key": list(range(n))},
        "keys of bytes": {**good, "key": [b"\xff"] * n},
        "nested keys": {**good, "key": [[["k"]]] * n},
        "no labels": {**good, "label": [None] * n},
        "no key": {**good, "key": [None] * n},
        "no class": {**good, "class_name": pa.array([None] * n, pa.string())},
        "names that steer": {**good, "key": [f"{STEERS}{i}" for i in range(n)], "class_name": [STEERS] * n},
        "long names": {**good, "key": ["k" * 10_000_000] * n},
    }
    for label in (2**31 - 1, 2**31, 2**40, -(2**40), -2):
        tables[f"a label {label}"] = {**good, "label": [label] + [0] * (n - 1)}
    for name in good:
        tables[f"no column {name}"] = {other: values for other, values in good.items() if other != name}
    return [(f"index: {what}", _index(pa.table(table))) for what, table in tables.items()]


def _index(table: pa.Table) -> Edit:
    def edit(root: Path) -> None:
        pq.write_table(table, root / "index.parquet", compression="zstd")
        reseal(root)

    return edit


def claim_rows(n_rows: int, shard_rows: int = SHARD_ROWS) -> Edit:
    """A store that says, wherever it says a number of rows, that it has so many, and an index of as many names."""

    def edit(root: Path) -> None:
        path = root / "zarr.json"
        node = read_fields(path)
        node["attributes"] |= {"n_rows": n_rows, "shard_rows": shard_rows}
        write_fields(path, node)
        for group in (LATENTS, FEATURES):
            for path in (root / group).glob("*/zarr.json"):
                node = read_fields(path)
                node["shape"][0] = n_rows
                node["chunk_grid"]["configuration"]["chunk_shape"][0] = shard_rows
                write_fields(path, node)
        reseal(root)

    return edit
