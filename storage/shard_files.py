"""Reading ranges of an array's shard files: from a directory by `preadv`, from an object store by merged requests.

Both take runs of neighbouring chunks (`Read`) and fill their buffers, whatever the caller's order. Of the open files
that the process is allowed, one array takes a quarter at most (and at most 4,096), all arrays together half; in a
process that ran out of them all the same, since others hold many, an array takes eight until the limit is raised.
Opening a file again costs a system call and, on a network file system, a round trip, so a trainer is well advised to
raise its soft limit (`raise_open_file_limit`).
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from storage.base.boundary import open_regular
from storage.base.errors import StoreError
from storage.cache import DiskCache
from storage.layout import ArrayLayout
from storage.read import Check, Read, ReadError
from storage.roots import Root
from storage.shard import HEAL

MIN_OPEN, MAX_OPEN = 8, 4096  # files of an array; a process that ran out of them goes on with the least
ROWS_AT_ONCE = 32  # so many files a thread needs open at once, fewer where few may be
ROWS_OF_OPEN = 16  # no more than one in so many of the files that the array may have open
PROBES = 8  # chunks of a batch that are looked for in the page cache before reading ahead
READ_AHEAD_BYTES = 128 << 10  # the kernel cuts a longer request for read-ahead short on a default block device


TOO_SHORT = f"the file is too short; {HEAL}"
_UNIT = attrgetter("unit")


class ShardFiles(Protocol):
    """The shard files of one array."""

    by_bytes: bool  # whether reading costs memory bandwidth (a directory) or waiting (a network)

    def where(self, unit: int) -> str:
        """The shard's path or URL, for messages."""

    def tail(self, unit: int, n_bytes: int) -> tuple[int, bytes]:
        """(bytes of the file, its last n_bytes, fewer when it is shorter). Raises FileNotFoundError."""

    def read(self, reads: Iterable[Read], check: Check | None) -> None:
        """Fill the buffers and have each read checked. `reads` are sorted by unit.

        Raises FileNotFoundError, ReadError(read, why) and what `check` raises.
        """

    def will_read(self, units: np.ndarray, offsets: np.ndarray, n_bytes: int) -> None:
        """Start reading [offset, offset + n_bytes) of each unit into the page cache."""

    def close(self) -> None:
        """Close every file."""


def raise_open_file_limit() -> None:
    """Raise this process's soft limit of open files to the hard one, so that shards stay open between batches."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_READING: dict[int, weakref.ref[LocalFiles]] = {}  # those that share the process's limit, by id
_ran_out_at = 0  # the limit under which the process had no file left


def _share() -> int:
    """How many files each of them may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft <= _ran_out_at:
        return MIN_OPEN
    return max(MIN_OPEN, min(MAX_OPEN, soft // 4, soft // (2 * max(1, len(_READING)))))


def _make_room(most: int) -> None:
    """Leave each of them so many open files, and those that a thread reads."""
    for reference in list(_READING.values()):
        files = reference()
        if files is not None:
            files._close_idle(most)


def _close_all(key: int, opened: dict[int, int]) -> None:
    _READING.pop(key, None)
    for fd in opened.values():
        os.close(fd)


def cannot_open(what: str, error: OSError) -> StoreError:
    """The error in one line, and what to do."""
    few = error.errno in (errno.EMFILE, errno.ENFILE)
    fix = "raise `ulimit -n`" if few else "look after the disk or its mount"
    return StoreError(f"{what} cannot be opened: {error.strerror}; {fix}")


class LocalFiles:
    """Shards in a directory, kept open while they fit under the bound, at most until this object is gone."""

    by_bytes = True

    def __init__(self, root: Path, path: str, layout: ArrayLayout) -> None:
        self._directory, self._layout = root / path, layout
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # unit → file descriptor, least recently used first
        self._pins: dict[int, int] = {}
        self._written = np.zeros(layout.store.n_units, dtype=np.int64)  # which file it was when it was opened first
        self._max_open = 0  # looked at anew with every file that is opened
        self._closed = False
        self._pid = os.getpid()
        weakref.finalize(self, _close_all, id(self), self._open).atexit = False  # at exit a thread may still read

    def where(self, unit: int) -> str:
        """The shard's path."""
        return str(self._directory / self._layout.shard_key(unit))

    def tail(self, unit: int, n_bytes: int) -> tuple[int, bytes]:
        """The file's size and end."""
        fd = self._acquire(unit)
        try:
            size = os.fstat(fd).st_size
            return size, os.pread(fd, n_bytes, max(0, size - n_bytes))
        finally:
            self._release(unit)

    def read(self, reads: Iterable[Read], check: Check | None) -> None:
        """One `preadv` a run."""
        for unit, of_unit in groupby(reads, key=_UNIT):
            fd = self._acquire(unit)
            try:
                for read in of_unit:
                    try:
                        got = os.preadv(fd, read.buffers, read.offset)
                        if got != read.n_bytes:
                            got = _read_slowly(fd, read.buffers, read.offset)
                    except OSError as error:
                        raise ReadError(read, f"{error.strerror}; look after the disk or its mount") from error
                    if got != read.n_bytes:
                        raise ReadError(read, TOO_SHORT)
                    if check is not None:
                        check(read)
            finally:
                self._release(unit)

    def read_rows(
        self, units: np.ndarray, offsets: np.ndarray, order: np.ndarray, targets: memoryview, n_bytes: int
    ) -> None:
        """What `read` does, for chunks that need no check and seldom touch, the usual case, with nothing made for each.

        Sorted by unit; chunk i goes to `targets[order[i]·n_bytes : (order[i] + 1)·n_bytes]`. Raises EOFError or OSError
        without a word; `read` says which chunk it was.

        Calls follow each other within `map`, with next to nothing of Python between them: a thread that wants Python's
        lock meanwhile and finds it taken sleeps, and waking it takes longer than a short row.
        """
        most = max(1, min(ROWS_AT_ONCE, self._max_open // ROWS_OF_OPEN))
        starts = (order * n_bytes).tolist()
        rows = zip(units.tolist(), [(targets[at : at + n_bytes],) for at in starts], offsets.tolist(), strict=True)
        while run := list(islice(rows, most)):
            fds: dict[int, int] = {}
            run_units, buffers, run_offsets = zip(*run, strict=True)
            try:
                for unit in dict.fromkeys(run_units):
                    fds[unit] = self._acquire(unit)
                got = list(map(os.preadv, map(fds.__getitem__, run_units), buffers, run_offsets))
                if got.count(n_bytes) != len(got):
                    for n, (unit, buffer, offset) in zip(got, run, strict=True):
                        if n != n_bytes and _read_slowly(fds[unit], [*buffer], offset) != n_bytes:
                            raise EOFError
            finally:
                for unit in fds:
                    self._release(unit)

    def will_read(self, units: np.ndarray, offsets: np.ndarray, n_bytes: int) -> None:
        """`posix_fadvise(WILLNEED)`, in pieces that the kernel does not cut short.

        Advising costs a quarter of what reading from the page cache does. So where a few chunks, spread over what is
        asked for, all lie there, the rest is taken to lie there too.
        """
        step = -(-len(units) // PROBES)
        if step and all(map(self._is_cached, units[::step].tolist(), (offsets[::step] + n_bytes - 1).tolist())):
            return
        for unit, offset in zip(units.tolist(), offsets.tolist(), strict=True):
            fd = self._acquire(unit)
            try:
                for start in range(offset, offset + n_bytes, READ_AHEAD_BYTES):
                    n = min(READ_AHEAD_BYTES, offset + n_bytes - start)
                    os.posix_fadvise(fd, start, n, os.POSIX_FADV_WILLNEED)
            finally:
                self._release(unit)

    def _is_cached(self, unit: int, offset: int) -> bool:
        """Whether the byte lies in the page cache; False, too, on a file system that does not say."""
        fd = self._acquire(unit)
        try:
            return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # EAGAIN: it does not; EOPNOTSUPP: no answer
            return False
        finally:
            self._release(unit)

    def close(self) -> None:
        """Close every file; one that is being read is closed after that, since its number may then be another's."""
        if self._pid != os.getpid():  # the lock may have been held when the process forked
            return
        with self._lock:
            self._max_open, self._closed = 0, True
            self._close_oldest(0)

    def _close_idle(self, most: int) -> None:
        if self._pid == os.getpid():  # as above
            with self._lock:
                self._close_oldest(most)

    def _close_oldest(self, most: int) -> None:
        if len(self._open) > most:
            idle = (unit for unit in self._open if unit not in self._pins)
            for unit in list(islice(idle, len(self._open) - most)):
                os.close(self._open.pop(unit))

    def _acquire(self, unit: int) -> int:
        """The open file, which stays open until it is released as often as it was acquired."""
        with self._lock:
            fd = self._open.get(unit)
            if fd is not None:
                self._open.move_to_end(unit)
                self._pins[unit] = self._pins.get(unit, 0) + 1
                return fd
        fd = self._open_file(unit)  # not under the lock: it may be a round trip
        with self._lock:
            if unit in self._open:  # another thread was first
                os.close(fd)
                fd = self._open[unit]
            self._open[unit] = fd
            self._pins[unit] = self._pins.get(unit, 0) + 1
            self._max_open = 0 if self._closed else _share()
            self._close_oldest(self._max_open)  # or this one goes out when it is released
        return fd

    def _open_file(self, unit: int) -> int:
        """Raises FileNotFoundError and, for whatever else is wrong, StoreError."""
        global _ran_out_at
        path = self.where(unit)
        if not self._closed and id(self) not in _READING:
            _READING[id(self)] = weakref.ref(self)
            _make_room(_share())
        try:
            try:
                fd = open_regular(path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                _ran_out_at = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                _make_room(0)
                fd = open_regular(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise cannot_open(f"shard {path}", error) from error
        status = os.fstat(fd)
        # Where its chunks lie, and which have been checked, is known of the file that was opened first.
        written = hash((status.st_ino, status.st_size, status.st_mtime_ns)) or 1
        if self._written[unit] not in (0, written):
            os.close(fd)
            raise StoreError(f"shard {path} was written again while it was read; open the store again")
        self._written[unit] = written
        return fd

    def _release(self, unit: int) -> None:
        with self._lock:
            self._pins[unit] -= 1
            if not self._pins[unit]:
                del self._pins[unit]
                if len(self._open) > self._max_open:
                    os.close(self._open.pop(unit))


class RemoteFiles:
    """Shards in an object store, through an optional cache on a local disk."""

    by_bytes = False

    def __init__(
        self,
        root: Root,
        path: str,
        layout: ArrayLayout,
        cache: DiskCache | None,
        crcs: Callable[[int], np.ndarray] | None,
    ) -> None:
        """`crcs` gives a unit's checksums from its receipt (None where there are none); asked for cached units only."""
        self._root: Any = root
        self._path, self._layout, self._crcs = path, layout, crcs
        self._cache, self._cache_writable = cache, True

    def _key(self, unit: int) -> str:
        return f"{self._path}/{self._layout.shard_key(unit)}"

    def where(self, unit: int) -> str:
        """The shard's URL."""
        return str(self._root.at(self._key(unit)))

    def tail(self, unit: int, n_bytes: int) -> tuple[int, bytes]:
        """The object's size and end."""
        return self._root.tail(self._key(unit), n_bytes)

    def read(self, reads: Iterable[Read], check: Check | None) -> None:
        """All runs of a shard in one call, which merges the near ones and fetches the rest at once."""
        for unit, of_unit in groupby(reads, key=_UNIT):
            cache = self._cache if self._cache is not None and unit < self._cache.n_units else None
            wanted = []
            for read in of_unit:
                if cache is None or self._crcs is None or not cache.fill(self._path, read, self._crcs(unit)):
                    wanted.append(read)
            if not wanted:
                continue
            starts = [read.offset for read in wanted]
            ends = [read.offset + read.n_bytes for read in wanted]
            parts = self._root.ranges(self._key(unit), starts, ends)
            for read, part in zip(wanted, parts, strict=True):
                if len(part) != read.n_bytes:
                    raise ReadError(read, TOO_SHORT)
                taken = 0
                for buffer in read.buffers:
                    buffer[:] = part[taken : taken + len(buffer)]
                    taken += len(buffer)
                if check is not None:
                    check(read)
                if cache is not None and self._cache_writable:
                    self._cache_writable = cache.keep(self._path, read)

    def will_read(self, units: np.ndarray, offsets: np.ndarray, n_bytes: int) -> None:
        """Nothing: requests are many at once already."""

    def close(self) -> None:
        """Nothing is held."""


def _read_slowly(fd: int, buffers: list[Any], offset: int) -> int:
    """After a short read (a signal, a file system's limit): buffer by buffer to the end of the file."""
    total = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            got = os.preadv(fd, [view], offset + total)
            if got == 0:
                return total
            total += got
            view = view[got:]
    return total
