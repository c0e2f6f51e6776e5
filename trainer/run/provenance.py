"""Which code trained a run, and on what: the version, the commit where the code lies in a clone, the machine.

What is not known is None; nothing here ends a run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

DISTRIBUTION = "offline-repa"
HERE = Path(__file__).resolve().parents[2]
GIT_S = 10.0


def provenance() -> dict[str, str | None]:
    """Version, commit (with a + where files differ from it) and machine of this process."""
    return {"version": version(), "commit": commit(), "machine": machine()}


def version() -> str | None:
    """Of the installed distribution."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = HERE) -> str | None:
    """Of the clone at `root`; None where it is none, or there is no git."""
    if not (root / ".git").exists():  # a clone around an environment says nothing of what is installed in it
        return None
    head, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else None


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()


def machine() -> str:
    """Its name, system, processor and cores."""
    return f"{platform.node() or 'unnamed'} ({platform.system()} {platform.machine()}, {os.cpu_count()} cores)"
