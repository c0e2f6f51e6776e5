"""`python -m pipeline`: stage one, and what else runs on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from pipeline.commands import COMMANDS, PROG
from storage.base.commands import run_one
from storage.base.console import run_program


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    return run_one(PROG, __doc__, COMMANDS, argv)


def script() -> NoReturn:
    """What is installed as `repa-pipeline`."""
    run_program(main, PROG)


if __name__ == "__main__":
    script()
