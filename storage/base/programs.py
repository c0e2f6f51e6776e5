"""The three programs of this project: how a user calls them, and that nothing in the user's folder gets in their way.

`python -m trainer` looks for `trainer` in the current directory first, where a `trainer.py` of the user's own is run in
place of ours, or a `storage.py` imported. An installed script, `repa-trainer`, does not look there. Neither do the
processes that a program starts, which `keep_to_own_modules` tells to: other commands of ours, workers, a compiler.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path

SCRIPT = "repa-"
MODULE = re.compile(r"python -m (storage|pipeline|trainer)\b")
TARGET = re.compile(r"\bmake (precompute|train)\b((?: [A-Z]+=[^\s`)]+)*)")  # of the Makefile
PACKAGE_OF = {"precompute": "pipeline", "train": "trainer"}
HERE = Path(__file__).resolve().parents[2]  # the folder that holds the three packages


def program(package: str) -> str:
    """How a user calls a package's commands, in the way in which this process was called."""
    return f"{SCRIPT}{package}" if is_script() else f"python -m {package}"


def is_script() -> bool:
    """Whether this process was called as an installed script, whose user may have no Makefile."""
    return Path(sys.argv[0]).name.startswith(SCRIPT)


def as_called(text: str) -> str:
    """Text that names commands `python -m …` and `make …`, as all messages do, by what works where the user is."""
    return MODULE.sub(lambda found: program(found[1]), TARGET.sub(_of_script, text) if is_script() else text)


def _of_script(found: re.Match[str]) -> str:
    options = re.sub(r" ([A-Z]+)=", lambda name: f" --{name[1].lower()} ", found[2])
    return f"{program(PACKAGE_OF[found[1]])} {found[1]}{options}"


def package_named(prog: str) -> str:
    """The other way round."""
    return prog.removeprefix("python -m ").removeprefix(SCRIPT)


def keep_to_own_modules(environment: MutableMapping[str, str]) -> None:
    """Change an environment so that Python, started in it, looks for no module in its current directory.

    Where our packages themselves were found there, in a checkout that is not installed, the place is named instead.
    """
    if not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() == HERE:
        before = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(HERE), *filter(None, before)]))
    environment["PYTHONSAFEPATH"] = "1"
