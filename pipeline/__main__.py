"""`python -m pipeline`: stage one, and what else runs on Ray."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.commands import COMMANDS, PROG
from storage.base.commands import run_one
from storage.base.console import run_command


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    return run_one(PROG, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run_command(main, PROG)
