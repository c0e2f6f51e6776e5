"""Which code trained a run, and on what: the version, the commit where the code lies in a clone, the machine.

What is not known is None; nothing here ends a run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

DISTRIBUTION = "offline-repa"
HERE = Path(__file__).resolve().parents[2]
REFERENCE = "ref: "
HASH = re.compile(r"[0-9a-f]{40,64}")


def provenance() -> dict[str, str | None]:
    """Version, commit and machine of this process."""
    return {"version": version(), "commit": commit(), "machine": machine()}


def version() -> str | None:
    """Of the installed distribution."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = HERE) -> str | None:
    """What is checked out in the clone at `root`, read from git's files; None where it is none.

    Whether files differ from it is not known without a process of git's, which a training does not start.
    """
    try:
        folder = root / ".git"
        if folder.is_file():  # a work tree beside its clone
            folder = root / folder.read_text(encoding="utf-8").partition(":")[2].strip()
        common = folder / "commondir"
        clone = folder / common.read_text(encoding="utf-8").strip() if common.is_file() else folder
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith(REFERENCE):
            return head if HASH.fullmatch(head) else None
        name = head.removeprefix(REFERENCE)
        for path in (folder / name, clone / name):
            if path.is_file():
                found = path.read_text(encoding="utf-8").strip()
                return found if HASH.fullmatch(found) else None
        packed = (clone / "packed-refs").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}") and HASH.match(line)), None)


def machine() -> str:
    """Its name, system, processor and cores."""
    return f"{platform.node() or 'unnamed'} ({platform.system()} {platform.machine()}, {os.cpu_count()} cores)"
