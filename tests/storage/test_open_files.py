"""Open files: bounded for an array and for all together, fewer where others hold many, and closed in the end.

Limits are lowered here to a few more files than the process has open, since other tests of it hold some.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.checks
import storage.gather
import storage.shard_files
from storage import StoreError, gather_into, open_store
from storage.codecs.int8 import INT8
from storage.shard_files import MIN_OPEN, LocalFiles
from tests.stores import FEATURES, LATENTS, make_store


def open_below(root: Path) -> int:
    """How many files below `root` this process has open."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    n = 0
    for link in links:
        with contextlib.suppress(FileNotFoundError):  # another thread closed it meanwhile
            n += os.readlink(link).startswith(str(root))
    return n


def test_open_files_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while eight threads read, each with files that it needs open."""
    root = tmp_path / "store"
    preadv, peak = os.preadv, [0]

    def counting(*arguments: Any) -> int:
        peak[0] = max(peak[0], open_below(root))
        return preadv(*arguments)

    monkeypatch.setattr(storage.gather, "MIN_SHARE_BYTES", 1)
    monkeypatch.setattr(os, "preadv", counting)
    data = make_store(root, n_rows=300, shard_rows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(map(int, os.listdir("/proc/self/fd"))) + 100  # other tests of this process hold some
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        patches = open_store(root).group(FEATURES, n_threads=8)["patches"]
        rows = np.random.default_rng(0).permutation(300)
        out = np.empty((300, *patches.row_shape), patches.dtype)
        for _ in range(2):
            patches.read_into(rows, 0, out)
            assert open_below(root) <= allowed // 4 < 300
        assert peak[0] <= allowed // 4 + 8  # each thread opens one before it knows that it is too many
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(out, data[FEATURES]["patches"][rows, 0])


def test_all_arrays_together_stay_under_half_of_the_limit_and_close_with_their_reader(tmp_path: Path) -> None:
    data = make_store(tmp_path, n_rows=200, shard_rows=1, codec=INT8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 4 * (len(os.listdir("/proc/self/fd")) + 20)  # other tests of this process hold some
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        groups = [open_store(tmp_path).group(path) for path in (LATENTS, FEATURES)]
        arrays = {(group.path, name): array for group in groups for name, array in group.arrays.items()}
        assert len(arrays) == 4
        rows = np.random.default_rng(0).permutation(200)
        out = {name: np.empty((200, *array.row_shape), array.dtype) for name, array in arrays.items()}
        for name, array in arrays.items():  # who comes later makes the others, which open no more, give way
            array.read_into(rows, 0, out[name])
            assert open_below(tmp_path) <= allowed // 2
        for _ in range(2):
            gather_into([(array, out[name]) for name, array in arrays.items()], rows, 0)
            assert 4 < open_below(tmp_path) <= allowed // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for (path, name), values in out.items():
        np.testing.assert_array_equal(values, data[path][name][rows, 0])
    del groups, arrays, array
    gc.collect()
    assert open_below(tmp_path) == 0


def _close_in_child(reader: Any, pipe: Any) -> None:
    reader.close()
    pipe.send("closed")


def test_a_reader_that_was_in_use_when_the_process_forked_is_closed_in_the_child(shared_tiny_store: Path) -> None:
    reader = open_store(shared_tiny_store).group(LATENTS)["moments"]
    files = reader.opened.files
    assert isinstance(files, LocalFiles)
    ours, theirs = get_context("fork").Pipe()
    with files._lock, reader.opened.threads._pool._shutdown_lock:  # type: ignore[attr-defined]
        child = get_context("fork").Process(target=_close_in_child, args=(reader, theirs))
        child.start()
    try:
        assert ours.poll(30), "closing waits for a lock that nobody will release"
    finally:
        child.kill()
        child.join()


def test_a_file_that_is_being_read_is_closed_afterwards(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    files = open_store(tmp_path / "s").group(LATENTS)["moments"].opened.files
    assert isinstance(files, LocalFiles)
    used, idle = files._acquire(0), files._acquire(1)
    files._release(1)
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(idle)
    os.fstat(used)  # still ours, so that no other file can get its number
    files._release(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(used)


def test_where_others_hold_nearly_all_files_an_array_takes_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shard_files, "_ran_out_at", 0)
    data = make_store(tmp_path, n_rows=120, shard_rows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 4 * (len(os.listdir("/proc/self/fd")) + 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    held: list[int] = []
    try:
        moments = open_store(tmp_path).group(LATENTS)["moments"]
        patches = open_store(tmp_path).group(FEATURES)["patches"]
        out = {reader: np.empty((120, *reader.row_shape), reader.dtype) for reader in (moments, patches)}
        moments.read_into(np.arange(120), 0, out[moments])
        assert open_below(tmp_path) > MIN_OPEN + 4
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(4):
            os.close(held.pop())
        rows = np.random.default_rng(0).permutation(120)
        for reader, values in out.items():
            reader.read_into(rows, 0, values)
        assert open_below(tmp_path) <= 2 * MIN_OPEN
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(out[moments], data[LATENTS]["moments"][rows, 0])
    np.testing.assert_array_equal(out[patches], data[FEATURES]["patches"][rows, 0])


def test_the_last_idle_files_make_room_and_a_raised_limit_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.shard_files, "_ran_out_at", 0)
    make_store(tmp_path, n_rows=60, shard_rows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    moments = open_store(tmp_path).group(LATENTS, checksums="never")["moments"]
    patches = open_store(tmp_path).group(FEATURES, checksums="never", n_threads=1)["patches"]
    out = {reader: np.empty((60, *reader.row_shape), reader.dtype) for reader in (moments, patches)}
    moments.read_into(range(3), 0, out[moments][:3])
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * (len(os.listdir("/proc/self/fd")) + 20), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        patches.read_into(range(60), 0, out[patches])  # in the places of the three
        os.close(held.pop())  # to look
        assert open_below(tmp_path) <= 3
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    patches.read_into(range(60), 0, out[patches])
    assert open_below(tmp_path) >= 60


@pytest.mark.parametrize("known", [True, False])
def test_too_many_open_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    make_store(tmp_path)
    reader = open_store(tmp_path).group(LATENTS, checksums="never")["moments"]
    out = np.empty((1, *reader.row_shape), reader.dtype)
    if known:  # its index
        reader.read_into([0], 0, out)
        reader.opened.files._close_idle(0)  # type: ignore[attr-defined]

    monkeypatch.setattr(storage.shard_files, "_ran_out_at", 0)

    def no_receipt(*arguments: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "receipts")

    def full(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StoreError, match=r"shard \S*c/0\S* cannot be opened: Too many open files; raise `ulimit -n`"):
        reader.read_into([0], 0, out)
    monkeypatch.undo()
    monkeypatch.setattr(storage.checks, "read_receipt", no_receipt)
    reader = open_store(tmp_path).group(LATENTS, checksums="first")["moments"]
    with pytest.raises(StoreError, match=r"the receipt of shard \S*c/0\S* cannot be opened: Too many open files"):
        reader.read_into([0], 0, out)
