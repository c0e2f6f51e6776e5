"""Where a store lies: a directory, or a prefix of an object store, behind the few calls that a store needs.

A *key* is a path below the root, with "/" between its parts. `open_root` takes a path or a URL: `s3://`, `gs://` and
`http(s)://` go through obstore (`remote.py`, imported only then), anything else is a directory.

Guarantees: whoever reads a key sees a whole file or none; `write` with `exclusive` never replaces one. In a directory
that is a temporary name, fsync and rename (`LocalRoot.write`), in an object store one upload. Roots pickle, so that a
worker on another machine opens its own connection.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from storage.base.boundary import not_regular, open_regular, read_regular
from storage.base.errors import StoreError
from storage.base.files import fsync_directory, make_directories, partial_name, publish, write_all

Buffer = bytes | np.ndarray
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_REMOTE = ("s3://", "s3a://", "gs://", "http://", "https://")
_MENDED_BY_THE_USER = {
    errno.ENOSPC: "free space or choose another root",
    errno.EDQUOT: "raise the quota or choose another root",
    errno.EACCES: "give this user write permission",
    errno.EPERM: "give this user write permission",
    errno.EROFS: "mount the file system writable or choose another root",
    errno.ENOENT: "a directory of the store vanished while it was written; restore the path and run again",
    errno.ENOTDIR: "a directory of the store was replaced by a file; restore the path and run again",
    errno.ESTALE: "the network file system lost the directory; mount it again and run again",
}


class Root(Protocol):
    """What a store asks of the place it lies in. Whatever is not a regular file is refused by StoreError, unopened."""

    concurrency: int  # requests worth having in flight at once

    @property
    def path(self) -> Path | None:
        """The directory, when it is one."""

    def __str__(self) -> str: ...

    def at(self, key: str) -> str:
        """The key as a user would name it, for messages."""

    def read(self, key: str) -> bytes:
        """The whole file, metadata or a receipt: at most MAX_JSON_BYTES. Raises FileNotFoundError."""

    def open(self, key: str) -> BufferedIOBase:
        """The file, to be read from any place in it, for those too large to hold. Raises FileNotFoundError."""

    def size(self, key: str) -> int:
        """Bytes of the file. Raises FileNotFoundError."""

    def tail(self, key: str, n_bytes: int) -> tuple[int, bytes]:
        """(bytes of the file, its last n_bytes, fewer when it is shorter). Raises FileNotFoundError."""

    def sizes(self, prefix: str) -> Mapping[str, int] | None:
        """Key → bytes of every file below the prefix; None where asking one by one is the better way."""

    def children(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted; [] when there is none. Raises StoreError where nothing can list."""

    def write(
        self, key: str, buffers: Iterable[Buffer], run_id: str, *, staging: str = "", exclusive: bool = False,
        fsync: bool = True,
    ) -> int:  # fmt: skip
        """Publish a file whole; returns its bytes. Raises FileExistsError when `exclusive` and there is one."""

    def zarr_store(self) -> Any:
        """The root as a read-only zarr-python store."""


def open_root(where: str | os.PathLike[str] | Root) -> Root:
    """The root at a path or URL. Raises StoreError for a URL of a kind that is not supported."""
    if not isinstance(where, str | os.PathLike):
        return where
    name = os.fspath(where)
    if not _URL.match(name):
        return LocalRoot(Path(name))
    if name.startswith("file://"):
        return LocalRoot(Path(name.removeprefix("file://")))
    if not name.startswith(_REMOTE):
        raise StoreError(f"a store lies in a directory or at {', '.join(_REMOTE)}, got {name}")
    from storage.remote import ObjectRoot

    return ObjectRoot(name)


def is_url(where: str) -> bool:
    """Whether a name is a URL, of whatever protocol, and not a path."""
    return _URL.match(where) is not None


def absolute(where: str | os.PathLike[str]) -> str:
    """The name of a root that holds on every machine: URLs as they are, paths made absolute."""
    name = os.fspath(where)
    return name.rstrip("/") if is_url(name) else str(Path(name).absolute())


class LocalRoot:
    """A directory."""

    concurrency = 8

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def at(self, key: str) -> str:
        """The file's path."""
        return f"{self.path}/{key}"  # pathlib would take longer than reading a receipt

    def read(self, key: str) -> bytes:
        """The whole file."""
        with _telling(self, key):
            return read_regular(self.at(key))

    def open(self, key: str) -> BufferedIOBase:
        """The file."""
        with _telling(self, key):
            return os.fdopen(open_regular(self.at(key)), "rb")

    def size(self, key: str) -> int:
        """Bytes of the file."""
        with _telling(self, key):
            status = os.stat(self.at(key))
        if not stat.S_ISREG(status.st_mode):
            raise not_regular(self.at(key))
        return status.st_size

    def tail(self, key: str, n_bytes: int) -> tuple[int, bytes]:
        """The file's size and end."""
        with self.open(key) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - n_bytes))
            return size, file.read(n_bytes)

    def sizes(self, prefix: str) -> None:
        """A stat a file is as quick as a listing."""
        return None

    def children(self, prefix: str) -> list[str]:
        """Names in the directory."""
        try:
            return sorted(os.listdir(self.path / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(
        self,
        key: str,
        buffers: Iterable[Buffer],
        run_id: str,
        *,
        staging: str = "",
        exclusive: bool = False,
        fsync: bool = True,
    ) -> int:
        """Write under a temporary name, sync, rename. `staging`: the existing directory (a key) to write in first.

        `fsync=False` leaves syncing to the kernel: a killed process still loses nothing, a power cut may leave a file
        with wrong bytes, which its checksums show. Raises StoreError when the disk is full, read-only, forbidden, gone.
        """
        final = self.path / key
        temporary: Path | None = None
        try:
            if staging:
                temporary = self.path / staging / secrets.token_hex(8)
            else:
                make_directories(final.parent, fsync=fsync)
                temporary = partial_name(final, run_id)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                write_all(fd, (np.frombuffer(b, np.uint8) if isinstance(b, bytes) else b for b in buffers))
                if fsync:
                    os.fsync(fd)
                nbytes = os.fstat(fd).st_size
            finally:
                os.close(fd)
            make_directories(final.parent, fsync=fsync)
            if exclusive:
                os.link(temporary, final)
                temporary.unlink()
                if fsync:
                    fsync_directory(final.parent)
            else:
                publish(temporary, final, fsync=fsync)
        except BaseException as error:
            _discard(temporary)
            if isinstance(error, OSError) and error.errno in _MENDED_BY_THE_USER:
                raise StoreError(
                    f"cannot write {final}: {error.strerror}; {_MENDED_BY_THE_USER[error.errno]}"
                ) from error
            raise
        return nbytes

    def zarr_store(self) -> Any:
        """zarr-python's store of this directory."""
        import zarr.storage

        return zarr.storage.LocalStore(self.path, read_only=True)


class _telling:  # noqa: N801
    """A name of the store that cannot be followed is the store's fault; a generator would cost more than the opening.

    A file in place of a folder means that what should lie in that folder is not there.
    """

    def __init__(self, root: LocalRoot, key: str) -> None:
        self._where = root.at(key)

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._where) from None
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL):
            raise StoreError(f"{self._where} cannot be opened: {error.strerror}; restore the file") from None
        if isinstance(error, ValueError) and not isinstance(error, StoreError):  # a NUL in the name
            raise StoreError(
                f"{self._where} is no name of a file ({error}); restore the metadata that names it"
            ) from None


def _discard(temporary: Path | None) -> None:
    try:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    except OSError:
        return  # the disk that failed the write may fail this too; the next run's sweep removes it
