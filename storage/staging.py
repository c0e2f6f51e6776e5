"""Where a run writes before it publishes, and how a dead run's leavings are told from a living run's.

A run owns `<group>/.staging/<run>/` in every group it writes, on the group's own file system so that publishing is a
rename. It holds an flock on `.runs/<run>` for as long as it lives; the kernel lets go of it however the run ends. A new
run takes each lock it can get, which proves the owner dead, and removes that run's staging. So a crash leaves no stray
file after the next run, and two runs at once leave each other's alone.

Cost: one lock file a run; a sweep of a dead run lists the root, the groups and the receipts once. Limit: on a file
system without flock nothing is swept (the lock cannot prove anything), which wastes space and harms nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from storage.base.errors import UserError
from storage.base.files import make_directories
from storage.layout import GROUP_KINDS, INDEX_FILE, RECEIPTS_DIR
from storage.roots import Root, open_root

STAGING_DIR = ".staging"
RUNS_DIR = ".runs"
BEING_MADE_S = 60.0  # a lock under its first name may not be held yet


class Staging:
    """A run's right to write into a store; a context manager held by the process that drives the run.

    `run_id` is what workers, on this machine or another, hand to `publish_unit`.
    """

    def __init__(self, root: str | os.PathLike[str] | Root) -> None:
        self.root = open_root(root)
        self.run_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock_fd: int | None = None

    @property
    def _lock_path(self) -> Path:
        assert self.root.path is not None
        return self.root.path / RUNS_DIR / self.run_id

    def __enter__(self) -> Staging:
        """Take the run's lock and sweep dead runs. Raises UserError when the root is a directory of something else."""
        refuse_foreign(self.root)
        if self.root.path is None:
            return self
        make_directories(self._lock_path.parent)
        # Locked under another name first: a lock file that is seen unlocked would look like a dead run's.
        unseen = self._lock_path.with_name(f".{self.run_id}")
        self._lock_fd = os.open(unseen, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # no flock on this file system: see the module's limit
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unseen, self._lock_path)
        self._sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.root.path is None:
            return
        _remove_leavings(self.root.path, self.run_id)
        self._lock_path.unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        with contextlib.suppress(OSError):  # not empty: another run lives
            self._lock_path.parent.rmdir()

    def prepare(self, group_path: str) -> None:
        """Make this run's staging directory in a group; only the driver does, so that a swept run cannot come back."""
        if self.root.path is not None:
            (self.root.path / staging_key(group_path, self.run_id)).mkdir(parents=True, exist_ok=True)

    def _sweep(self) -> None:
        assert self.root.path is not None
        for lock in self._lock_path.parent.iterdir():
            if lock.name.lstrip(".") in (self.run_id, ""):
                continue
            with contextlib.suppress(FileNotFoundError):  # its owner has just ended
                being_made = lock.name.startswith(".") and time.time() - lock.stat().st_mtime < BEING_MADE_S
                if not being_made and _owner_is_dead(lock):
                    _remove_leavings(self.root.path, lock.name.lstrip("."))
                    lock.unlink(missing_ok=True)


def staging_key(group_path: str, run_id: str) -> str:
    """Where `run_id` writes the shards of a group before they are renamed into place."""
    return f"{group_path}/{STAGING_DIR}/{run_id}"


def living_runs(root: Root) -> list[str]:
    """The runs that hold a lock of the root now, by name; none on a remote root, which has no locks."""
    if root.path is None:
        return []
    living = []
    for lock in sorted((root.path / RUNS_DIR).glob("[!.]*")):
        with contextlib.suppress(FileNotFoundError):  # its owner has just ended
            if stat.S_ISREG(lock.lstat().st_mode) and not _owner_is_dead(lock):
                living.append(lock.name)
    return living


def _owner_is_dead(lock: Path) -> bool:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        fd = os.open(lock, os.O_RDWR | flags)  # a network file system locks what may be written only
    except FileNotFoundError:
        raise
    except OSError:  # another user's store, or one mounted to be read
        try:
            fd = os.open(lock, os.O_RDONLY | flags)
        except FileNotFoundError:
            raise
        except OSError:  # a link, a socket: no lock of ours
            return False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or the file system has no flock: either way nothing is proved
        return False
    finally:
        os.close(fd)
    return True


def refuse_foreign(root: Root) -> None:
    """Raise UserError when the root is a directory, or a file, of something else."""
    names = set(root.children(""))
    if "zarr.json" in names:
        return
    is_file = root.path is not None and root.path.exists() and not root.path.is_dir()
    if is_file or {name for name in names if not name.startswith(".")} - {INDEX_FILE, *GROUP_KINDS, RECEIPTS_DIR}:
        raise UserError(f"{root} exists and is not a store; name an empty or new directory as the store")


def _remove_leavings(root: Path, run_id: str) -> None:
    """Remove what the run staged and did not publish; nothing of any other run."""
    groups = [group for kind in GROUP_KINDS for group in (root / kind).glob("[!.]*")]
    for group in groups:
        staging = group / STAGING_DIR
        if staging.is_symlink():  # we make none: what lies behind is not ours to remove
            continue
        shutil.rmtree(staging / run_id, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or not empty: another run's
            staging.rmdir()
    receipts = [root / RECEIPTS_DIR / group.relative_to(root) for group in groups]
    directories = [root, *(root / kind for kind in GROUP_KINDS), *groups, *receipts, root / RECEIPTS_DIR]
    arrays = [array for group in groups for array in group.glob("[!.]*/")]
    for directory in [*directories, *arrays]:
        for leaving in directory.glob(f".*.{glob.escape(run_id)}.*.partial"):
            if leaving.is_dir():
                shutil.rmtree(leaving, ignore_errors=True)
            else:
                leaving.unlink(missing_ok=True)
