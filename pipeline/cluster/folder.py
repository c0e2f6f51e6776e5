"""Where a Ray of this run's own keeps its sockets, logs and what it spills: a folder that can hold them.

Ray takes RAY_TMPDIR, else TMPDIR, else /tmp, and finds out late that it is of no use: the path of a socket may have 107
bytes, and batch systems give TMPDIRs that leave too few of them; others are full, not there, or cannot hold a socket.
So the folder is tried first. Where RAY_TMPDIR names it, it must do; otherwise another is taken when it does not, under
a name of its own that only this user may enter, and removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from storage.base.errors import UserError
from storage.base.shown import shown

SOCKET_BYTES = 107  # of a path, at most
ROOM_BYTES = 2**20  # that a folder must have left at the least
DEFAULT = "/tmp"
OTHERS = ("/tmp", "/var/tmp", f"/run/user/{os.getuid()}", "/dev/shm")  # memory comes last: Ray may spill there
ODD = set(" \t\n\"'\\")  # Ray hands the path on in a command line, which these would cut


@contextlib.contextmanager
def ray_folder() -> Iterator[str]:
    """A folder for Ray's `_temp_dir`. Raises UserError, naming the variable to set, when there is none."""
    named = os.environ.get("RAY_TMPDIR", "")
    own = named or os.environ.get("TMPDIR", "") or DEFAULT
    why = why_not(Path(own) / "ray")
    if why is None:
        yield f"{own}/ray"
        return
    if named:
        raise UserError(f"Ray cannot work in RAY_TMPDIR {shown(named)}: {why}; name another folder, or unset it")
    made = _make()
    if made is None:
        raise UserError(
            f"Ray cannot work in {shown(own)}: {why}; nor in any of {', '.join(OTHERS[:-1])}, {OTHERS[-1]}: set "
            "RAY_TMPDIR to a folder of a short path that can be written"
        )
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def why_not(folder: Path) -> str | None:
    """Why Ray could not work in the folder, which need not be there yet; None when it could."""
    socket_name = f"/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    n_bytes = len(os.fsencode(folder)) + len(socket_name)
    if not folder.is_absolute():
        return "it must be an absolute path"
    if ODD & set(str(folder)):
        return "it has blanks or quotes in its path"
    if n_bytes > SOCKET_BYTES:
        return f"its path leaves no room for a socket's, which would be of {n_bytes} bytes and may be of {SOCKET_BYTES}"
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=existing) as trial, socket.socket(socket.AF_UNIX) as one:
            one.bind(f"{trial}/socket")
            with open(f"{trial}/room", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _make() -> str | None:
    """A new folder that only this user may enter, in the first other place that will do."""
    for place in OTHERS:
        with contextlib.suppress(OSError):
            made = tempfile.mkdtemp(prefix="ray-", dir=place)
            if why_not(Path(made)) is None:
                return made
            os.rmdir(made)
    return None
