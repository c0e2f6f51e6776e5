"""Environments that lack what an extra does not bring: what it brings by name, and by what those packages need."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
HIDING = """
import re
import sys
from importlib.machinery import PathFinder

BROUGHT, HIDDEN = frozenset({brought!r}), frozenset({hidden!r})


class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):  # of whose entry points zarr makes codecs
        found = PathFinder.find_distributions(*context)
        return (one for one in found if re.sub(r"[-_.]+", "-", one.name).lower() in BROUGHT)


sys.meta_path[sys.meta_path.index(PathFinder)] = Lacking
"""


def requirements(extra: str) -> list[Requirement]:
    """What pyproject.toml says of an extra ("": of a plain install), without this project's own other extras."""
    listed: list[str] = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(text) for text in listed]


def brought_by(extra: str) -> set[str]:
    """Names of all distributions of this environment that the extra brings, directly or not."""
    brought: set[str] = set()
    waiting = [(NAME, extra), (NAME, "")]
    seen = set(waiting)
    while waiting:
        name, of = waiting.pop()
        brought.add(name)
        for needed in requirements(of) if name == NAME else _needed(name, of):
            needs = canonicalize_name(needed.name)
            new = {(needs, ""), *((needs, more) for more in needed.extras)} - seen
            seen |= new
            waiting += new
    return brought


def _needed(name: str, extra: str) -> list[Requirement]:
    try:
        needed = [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:  # of another platform
        return []
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]


def without_others(extra: str, folder: Path, **environment: str) -> dict[str, str]:
    """Environment variables with which Python and its children find only what the extra brings, and this checkout."""
    brought = brought_by(extra)
    modules = metadata.packages_distributions()
    hidden = {
        module for module, names in modules.items() if not brought & {canonicalize_name(name) for name in names}
    } - {"storage", "pipeline", "trainer"}
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING.format(brought=sorted(brought), hidden=sorted(hidden)))
    return {**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", "OMP_NUM_THREADS": "1", **environment}


def python(*arguments: str, env: dict[str, str], program: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 250, "cwd": REPOSITORY}
    return subprocess.run([program, *arguments], env=env, **options)
