"""Files that are either whole or absent: temporary name, fsync, rename, directory fsync.

What a store publishes goes through `roots.py`, which uses these steps; `write_atomic` is for other small files. Cost:
two fsyncs a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from storage.base.errors import UserError

LINKS_WITHIN_FOLDERS = 5000  # mutual links of ten folders are ten million paths
IOV_MAX = 1024  # buffers a single writev or preadv takes on Linux
WRITE_BYTES = 1 << 20  # fits a core's cache


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries (a rename, a new file) survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(directory: Path, *, fsync: bool = True) -> None:
    """`mkdir -p`, durably: each directory made is synced into its parent."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        if fsync:
            fsync_directory(path.parent)


def walk_files(root: Path) -> Iterator[str]:
    """Paths below a folder of its regular files, at any depth, with "/" between the parts; not in order.

    Links are followed, to files and to folders, but not into a folder that holds the link; names that begin with a dot
    are left out. Raises UserError where folders that lead into each other by links would have no end.
    """
    n_within_links = 0
    folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while folders:
        folder, above = folders.pop()
        for entry in os.scandir(root / folder):
            path = f"{folder}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield path
            elif entry.is_dir() and (real := os.path.realpath(entry)) not in above:
                n_within_links += entry.is_symlink() and len(above) > 1
                if n_within_links > LINKS_WITHIN_FOLDERS:
                    raise UserError(
                        f"{root}: more than {LINKS_WITHIN_FOLDERS} links lead to folders below others, such as {path}; "
                        "remove links of folders that lead into each other"
                    )
                folders.append((f"{path}/", (*above, real)))


def publish(temporary: Path, final: Path, *, fsync: bool = True) -> None:
    """Rename a synced temporary file (or directory) to its final name and sync the directory that holds it."""
    os.replace(temporary, final)
    if fsync:
        fsync_directory(final.parent)


def write_all(fd: int, buffers: Iterable[np.ndarray]) -> None:
    """`writev` every buffer (uint8, 1-D) in order, about WRITE_BYTES at a time. Raises OSError.

    A buffer is taken from the iterable just before it is written, so what was just computed from it is still cached.
    """
    pending: list[np.ndarray] = []
    n_bytes = 0
    for buffer in buffers:
        pending.append(buffer)
        n_bytes += buffer.nbytes
        if n_bytes >= WRITE_BYTES or len(pending) == IOV_MAX:
            _writev(fd, pending)
            pending, n_bytes = [], 0
    _writev(fd, pending)


def _writev(fd: int, pending: list[np.ndarray]) -> None:
    """One `writev`, going on after a short one."""
    first = 0
    while first < len(pending):
        written = os.writev(fd, pending[first:])  # type: ignore[arg-type]
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]


def partial_name(path: Path, run_id: str) -> Path:
    """A fresh temporary name beside `path` that says which run it belongs to, so that a sweep can tell."""
    return path.with_name(f".{path.name}.{run_id}.{secrets.token_hex(4)}.partial")


def follow_umask(folder: Path) -> None:
    """Give every file below a folder the mode of a new one there; some libraries publish private temporary files.

    The umask itself can only be read by setting it, for all threads; a file that is made and removed shows it.
    """
    probe = partial_name(folder / "mode", "probe")
    with open(probe, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def append_line(path: Path, line: str) -> None:
    """Add a line of JSON to a file of such lines, durably; a last one that a kill cut short goes. Writers take turns.

    Raises UserError for what is no file, OSError.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file (a folder, pipe or device); remove it")
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole = file.seek(0, os.SEEK_END)
        while whole and file.seek(whole - 1) >= 0 and file.read(1) != b"\n":
            whole -= 1
        file.seek(whole)
        last = file.read()
        try:
            json.loads(last or b"0")
        except ValueError:
            file.truncate(whole)
            last = b""
        file.write(b"\n" * bool(last) + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes, run_id: str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part. Raises OSError."""
    make_directories(path.parent)
    temporary = partial_name(path, run_id)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
