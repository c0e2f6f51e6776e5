"""The files of a data set: below a local folder, or below a URL that fsspec understands (s3://, gs://, http://, …).

A path is relative to the root, with "/" between its parts. Leftovers (`leftovers.py`) are told apart and not entered.
Links are followed, but for those that lead back to a folder on their own path. `s3`, `gs`, `az` and `http` go through
obstore's fsspec adapter, with the credentials and retries that stores use (`storage/remote.py`); other protocols go
through what fsspec has for them. An http server cannot list: name one file.

Reading many parts keeps one file open locally, and `REQUESTS` range requests in flight remotely.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import IO, Any, NamedTuple, Protocol

from pipeline.sources.leftovers import OWN_FILE, leftover
from pipeline.sources.protocol import MAX_SAMPLE_BYTES, Unreadable, too_large
from storage.base.boundary import open_regular
from storage.base.errors import StoreError, UserError
from storage.base.extras import how_to_install
from storage.base.shown import shown

REQUESTS = 32  # range requests in flight; an answer takes tens of milliseconds, whatever its size
CONNECTIONS = 4  # the same where a request in flight may be a connection of its own
OBSTORE_PROTOCOLS = frozenset("s3 s3a gs az abfs http https".split())
WHOLE = -1
UNKNOWN_BYTES = -1  # a size that cannot be known without reading the images
LINKS_WITHIN_LINKS = 5000  # folders; mutual links of ten folders are ten million paths
ABSENT = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})  # one file is


@dataclass(frozen=True)
class File:
    """A file, and its size; a link that leads nowhere has UNKNOWN_BYTES."""

    path: str
    nbytes: int


@dataclass(frozen=True)
class Part:
    """Bytes [start, start + nbytes) of a file, or all of it."""

    path: str
    start: int = 0
    nbytes: int = WHOLE


class Entries(NamedTuple):
    """What lies directly below a folder, sorted: paths of the folders, the files, and what is nobody's sample."""

    folders: list[str]
    files: list[File]
    leftovers: list[str]


class Files(Protocol):
    """What sources ask of the place their data lies in. Pickles without handles."""

    root: str

    def entries(self, folder: str) -> Entries:
        """What lies directly below a folder ("" is the root)."""
        ...

    def open(self, path: str) -> IO[bytes]:
        """A seekable file. Raises OSError."""
        ...

    def read_many(self, parts: Sequence[Part]) -> Iterator[bytes | Unreadable]:
        """The parts in order. A whole file that is gone or forbidden is unreadable; all else raises OSError."""
        ...


def walk(files: Files, folder: str) -> tuple[list[File], list[str]]:
    """(the files at any depth below a folder, the leftovers that were not entered), sorted by path."""
    listed: list[File] = []
    leftovers: list[str] = []
    folders = [folder]
    while folders:
        entries = files.entries(folders.pop())
        folders += entries.folders
        listed += entries.files
        leftovers += entries.leftovers
    return sorted(listed, key=lambda file: file.path), sorted(leftovers)


def matches(files: Files, pattern: str, folder: str = "") -> tuple[list[File], list[str]]:
    """(the files below a folder whose path matches a shell pattern, level by level; the leftovers that do), sorted."""
    first, _, rest = pattern.partition("/")
    below, here, others = files.entries(folder)
    leftovers = [path for path in others if fnmatchcase(posixpath.basename(path), first)]
    if not rest:
        return [file for file in here if fnmatchcase(posixpath.basename(file.path), first)], leftovers
    matching: list[File] = []
    for path in below:
        if fnmatchcase(posixpath.basename(path), first):
            deeper, deeper_leftovers = matches(files, rest, path)
            matching += deeper
            leftovers += deeper_leftovers
    return matching, leftovers


class LocalFiles:
    """Files below a local folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._n_within_links = 0

    def entries(self, folder: str) -> Entries:
        """One directory scan, and one stat a file."""
        folders: list[str] = []
        files: list[File] = []
        leftovers: list[str] = []
        for entry in os.scandir(os.path.join(self.root, folder)):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name == OWN_FILE:
                continue
            if leftover(entry.name):
                leftovers.append(path)
            elif _is_folder(entry):
                if entry.is_symlink() and self._leads_back(folder, entry.path):
                    leftovers.append(path)
                else:
                    folders.append(path)
            elif (file := _file(path, entry)) is not None:
                files.append(file)
            else:
                leftovers.append(path)
        return Entries(sorted(folders), sorted(files, key=lambda file: file.path), sorted(leftovers))

    def _leads_back(self, folder: str, link: str) -> bool:
        """Whether a link in a folder leads to that folder, to one that the path to it passes through, or above these.

        Raises UserError where links that lead into each other have more paths than anybody wants.
        """
        parts = folder.split("/") if folder else []
        passed = [os.path.join(self.root, *parts[:n]) for n in range(len(parts) + 1)]
        if sum(map(os.path.islink, passed[1:])) > 1:
            self._n_within_links += 1
        if self._n_within_links > LINKS_WITHIN_LINKS:
            raise UserError(
                f"DATA {shown(self.root)}: more than {LINKS_WITHIN_LINKS} folders are reached over links within links, "
                f"such as {shown(folder)}; remove links of folders that lead into each other"
            )
        target = os.path.join(os.path.realpath(link), "")
        return any(os.path.join(os.path.realpath(path), "").startswith(target) for path in passed)

    def open(self, path: str) -> IO[bytes]:
        """A buffered file. Raises StoreError for a pipe or device, which would have no end."""
        return os.fdopen(open_regular(os.path.join(self.root, path)), "rb")

    def read_many(self, parts: Sequence[Part]) -> Iterator[bytes | Unreadable]:
        """Consecutive parts of one file share its handle."""
        container, fd = "", -1
        try:
            for part in parts:
                if part.nbytes == WHOLE:
                    yield self._read_file(part.path)
                    continue
                if part.path != container:
                    if fd >= 0:
                        os.close(fd)
                    container, fd = "", -1
                    fd = open_regular(os.path.join(self.root, part.path))
                    container = part.path
                yield _whole(os.pread(fd, part.nbytes, part.start), part, self.root)
        finally:
            if fd >= 0:
                os.close(fd)

    def _read_file(self, path: str) -> bytes | Unreadable:
        try:
            with os.fdopen(open_regular(os.path.join(self.root, path)), "rb", buffering=0) as file:
                nbytes = os.fstat(file.fileno()).st_size
                return file.read() if nbytes <= MAX_SAMPLE_BYTES else too_large(nbytes)
        except StoreError:
            return Unreadable("cannot be read: a folder, pipe or device")
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            os.stat(self.root)  # an unmounted disk is not a million missing images
            return Unreadable(f"cannot be read: {error.strerror}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False also for a link that leads in circles."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _file(path: str, entry: os.DirEntry[str]) -> File | None:
    """A regular file, or a link that leads nowhere; None for pipes and devices."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return File(path, UNKNOWN_BYTES)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return File(path, UNKNOWN_BYTES)
    return File(path, status.st_size) if stat.S_ISREG(status.st_mode) else None


class RemoteFiles:
    """Files below a URL. The connection is made at the first use, in whichever process and thread that is."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._mine = threading.local()  # fsspec's own are not to be shared: FTP's, say, has one conversation at a time

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        RemoteFiles.__init__(self, state["root"])

    @property
    def file_system(self) -> Any:
        """fsspec's file system for the root. Raises UserError, and OSError when it is out of reach."""
        return self._connection()[0]

    def _connection(self) -> tuple[Any, str]:
        """The file system, and what it calls the root."""
        if self._by_obstore:
            return self._obstore, self.root.split("://")[1].strip("/")
        if not hasattr(self._mine, "connection"):
            self._mine.connection = _connect(self.root)
        return self._mine.connection

    @property
    def _by_obstore(self) -> bool:
        return self.root.split("://")[0] in OBSTORE_PROTOCOLS

    @cached_property
    def _obstore(self) -> Any:
        try:
            from obstore.fsspec import FsspecStore

            from storage.remote import connection_options

            make: Any = FsspecStore  # its stubs do not know fsspec's own arguments
            return make(self.root.split("://")[0], skip_instance_cache=True, **connection_options(self.root))
        except UserError:
            raise
        except (ImportError, ValueError) as error:
            raise _cannot_be_opened(self.root, error) from None

    def entries(self, folder: str) -> Entries:
        """One listing, a thousand entries a request."""
        with self._errors(folder):
            listed = self.file_system.ls(self._at(folder), detail=True)
        named = [(path, entry) for entry in listed if (path := self._below(entry["name"])) and path != folder]
        leftovers = sorted(path for path, _ in named if leftover(posixpath.basename(path)))
        seen = [(path, entry) for path, entry in named if not leftover(posixpath.basename(path))]
        folders = sorted(path for path, entry in seen if entry["type"] == "directory")
        files = [File(path, int(entry["size"])) for path, entry in seen if entry["type"] == "file"]
        return Entries(folders, sorted(files, key=lambda file: file.path), leftovers)

    def size(self, path: str) -> int | None:
        """Bytes of a file; None for a folder. Raises FileNotFoundError when it is neither."""
        with self._errors(path):
            entry = self.file_system.info(self._at(path))
        return int(entry["size"]) if entry["type"] == "file" else None

    def open(self, path: str) -> IO[bytes]:
        """A file that reads ahead."""
        self.size(path)  # where there is none, obstore's file says so from its destructor too
        with self._errors(path):
            return self.file_system.open(self._at(path), "rb")

    def read_many(self, parts: Sequence[Part]) -> Iterator[bytes | Unreadable]:
        """All parts are asked for at once, and held until they are taken."""
        requests = REQUESTS if self._by_obstore else CONNECTIONS
        with ThreadPoolExecutor(min(requests, max(1, len(parts)))) as pool:
            yield from pool.map(self._read, parts)

    def _read(self, part: Part) -> bytes | Unreadable:
        if part.nbytes == 0:
            return b""  # which no range request can say
        with self._errors(part.path):
            try:
                if part.nbytes == WHOLE:
                    return self.file_system.cat_file(self._at(part.path))
                data = self.file_system.cat_file(self._at(part.path), start=part.start, end=part.start + part.nbytes)
                return _whole(data, part, self.root)
            except (FileNotFoundError, PermissionError):
                if part.nbytes != WHOLE:
                    raise
                return Unreadable("cannot be read: no such object")

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _below(self, name: str) -> str:
        return name.split("://")[-1].strip("/").removeprefix(self._connection()[1]).lstrip("/")

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Every file system has errors of its own; here they are all OSError with the URL in it."""
        try:
            yield
        except (FileNotFoundError, PermissionError, UserError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise OSError(errno.EIO, f"cannot be reached ({first_line})", self._at(path)) from error


def _connect(root: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, host and user of the URL included, and what it calls the root."""
    try:
        import fsspec

        with _quiet_destructors():
            try:
                file_system, path = fsspec.url_to_fs(root)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # which hold what was half made
                raise
    except (ImportError, ValueError, TypeError) as error:
        raise _cannot_be_opened(root, error) from None
    except Exception as error:  # each protocol has its own
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise OSError(errno.EIO, f"cannot be reached ({first_line})", root) from error
    return file_system, path.strip("/")


def _cannot_be_opened(root: str, error: Exception) -> UserError:
    return UserError(f"DATA {root} cannot be opened: {error}; {how_to_install('remote')}")


@contextmanager
def _quiet_destructors() -> Iterator[None]:
    """A file system that could not connect complains once more from its destructor; the error itself is enough."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _whole(data: bytes, part: Part, root: str) -> bytes:
    if len(data) != part.nbytes:
        raise OSError(errno.EIO, f"ends before byte {part.start + part.nbytes}", f"{root}/{part.path}")
    return data
