"""What else is read that somebody else wrote: arrays without a store, imports, caches, staging; one line each."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs import Pickle
from safetensors.numpy import save_file

from storage import StoreError, UserError, open_array
from storage.__main__ import main
from storage.cache import DiskCache
from storage.read import Read
from storage.staging import Staging, living_runs
from tests.storage import edits

IMPORT = ["--resolution", "128", "--shard-rows", "4", "--name", "x"]


@pytest.mark.parametrize("field", ["filters", "compressor"])
def test_a_foreign_array_never_runs_code(tmp_path: Path, field: str) -> None:
    """Zarr v2 knows a codec that unpickles what a chunk holds, whatever the type of the array."""
    where = tmp_path / "a"
    array = zarr.create_array(
        str(where), shape=(4, 1, 2), chunks=(4, 1, 2), dtype="f4", zarr_format=2, compressors=None
    )
    array[:] = 1
    about = json.loads((where / ".zarray").read_text())
    about[field] = [{"id": "pickle", "protocol": 5}] if field == "filters" else {"id": "pickle", "protocol": 5}
    (where / ".zarray").write_text(json.dumps(about))
    (where / "0.0.0").write_bytes(Pickle().encode(np.array([1.0])))
    with pytest.raises(StoreError, match=r"pickle"):
        open_array(where)


def _array(where: Path) -> None:
    zarr.create_array(str(where), shape=(4, 1, 2), chunks=(1, 1, 2), dtype="f4")[:] = 1


@pytest.mark.parametrize("how", [how for how in edits.FILE_EDITS if how not in ("longer", "removed")])
def test_foreign_metadata_that_is_none(tmp_path: Path, how: str) -> None:
    _array(tmp_path / "a")
    edits.FILE_EDITS[how](tmp_path / "a" / "zarr.json")
    with pytest.raises(StoreError):
        open_array(tmp_path / "a")


@pytest.mark.parametrize("value", edits.VALUES, ids=range(len(edits.VALUES)))
@pytest.mark.parametrize("field", ["shape", "data_type", "chunk_grid", "codecs", "fill_value"])
def test_foreign_metadata_of_any_kind(tmp_path: Path, field: str, value: object) -> None:
    _array(tmp_path / "a")
    edits.set_field("zarr.json", (field,), value)(tmp_path / "a")
    with contextlib.suppress(StoreError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = open_array(tmp_path / "a")
        out = np.empty((1, *array.row_shape), array.dtype)
        array.read_into([0], 0, out)


def _npy_folder(source: Path) -> None:
    for row in range(4):
        path = source / "00000" / f"{row}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ones((8, 4, 4), np.float32))
    labels = [[f"00000/{row}.npy", row] for row in range(4)]
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))


def _safetensors_folder(source: Path) -> None:
    source.mkdir()
    latents = np.ones((4, 4, 4, 4), np.float32)
    save_file({"latents": latents, "latents_flip": latents, "labels": np.arange(4)}, source / "a.safetensors")


SOURCES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "repa-npy": (_npy_folder, ["dataset.json", "00000/2.npy"]),
    "lightningdit": (_safetensors_folder, ["a.safetensors"]),
}


@pytest.mark.parametrize("how", ["nothing", *(how for how in edits.FILE_EDITS if how != "removed")])
@pytest.mark.parametrize("kind", SOURCES)
def test_an_import_of_files_that_are_none(tmp_path: Path, kind: str, how: str) -> None:
    make, names = SOURCES[kind]
    for i, name in enumerate(names):
        source, store = tmp_path / f"source{i}", tmp_path / f"store{i}"
        make(source)
        argv = ["import", str(source), "--from", kind, "--store", str(store), *IMPORT]
        if how == "nothing":
            assert main(argv) == 0
            continue
        edits.FILE_EDITS[how](source / name)
        with pytest.raises((UserError, OSError)):
            main(argv)


@pytest.mark.parametrize("header", [
    {"descr": "<f4", "fortran_order": False, "shape": (10**15,)},
    {"descr": "<f4", "fortran_order": False, "shape": (8, 4, -4)},
    {"descr": "<f4", "fortran_order": False, "shape": (8, 4, 2**63)},
    {"descr": "|O", "fortran_order": False, "shape": (8, 4, 4)},
    {"descr": "<f4", "fortran_order": False, "shape": "x"},
    {"descr": [("a", "<f4")], "fortran_order": False, "shape": (8, 4, 4)},
    {"descr": 7, "fortran_order": False, "shape": (8, 4, 4)},
])  # fmt: skip
def test_an_npy_header_is_compared_with_its_file(tmp_path: Path, header: dict[str, object]) -> None:
    _npy_folder(tmp_path / "source")
    for name in ("0.npy", "2.npy"):
        text = repr(header).encode().ljust(117) + b"\n"
        raw = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(512)
        (tmp_path / "source" / "00000" / name).write_bytes(raw)
        with pytest.raises(UserError, match=r"npy file|real numbers"):
            main(["import", str(tmp_path / "source"), "--from", "repa-npy", "--store", str(tmp_path / "s"), *IMPORT])
        _npy_folder(tmp_path / "source")


@pytest.mark.parametrize("value", edits.VALUES[1:], ids=range(1, len(edits.VALUES)))
def test_dataset_json_of_any_kind(tmp_path: Path, value: object) -> None:
    source = tmp_path / "source"
    _npy_folder(source)
    whole = [
        {"labels": value},
        {"labels": [[f"00000/{row}.npy", value] for row in range(4)]},
        {"labels": [value]},
        value,
    ]
    for i, content in enumerate(whole):
        (source / "dataset.json").write_text(json.dumps(content))
        with contextlib.suppress(UserError):
            main(["import", str(source), "--from", "repa-npy", "--store", str(tmp_path / f"s{i}"), *IMPORT])


@pytest.mark.parametrize("how", ["a pipe", "a device", "a folder", "nowhere", "a socket"])
def test_a_cache_that_is_no_file_is_not_used(tmp_path: Path, how: str) -> None:
    cache = DiskCache(tmp_path, 1)
    path = cache.path("features/x/cls", 0)
    path.parent.mkdir()
    path.write_bytes(b"x")
    edits.FILE_EDITS[how](path)
    read = Read(0, 0, 8, [0], [bytearray(4), bytearray(4)])
    assert not cache.fill("features/x/cls", read, np.zeros(1, np.uint32))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert not cache.keep("features/x/cls", read)
    assert not (path.parent / "nowhere").exists()


def test_a_run_removes_nothing_that_links_lead_to(tmp_path: Path) -> None:
    """A lock's name, and a link in place of the staging folder, would say what to remove."""
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "letters" / "one").write_text("dear")
    store = tmp_path / "store"
    edits.make_good(store)
    (store / "features/tiny-vit/.staging").symlink_to(home)
    locks = store / ".runs"
    locks.mkdir()
    for name in ("letters", "...", "*"):
        (locks / name).write_text("")
        os.utime(locks / name, (time.time() - 1000,) * 2)
    os.mkfifo(locks / "pipe")
    (locks / "link").symlink_to(home / "letters" / "one")
    with Staging(store) as staging:
        assert living_runs(staging.root) == [staging.run_id]
    assert (home / "letters" / "one").read_text() == "dear"
