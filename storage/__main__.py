"""`python -m storage`: look at stores, check them, compare them, take their numbers elsewhere and bring others' in.

A STORE is a directory or a URL (s3://, gs://, http(s)://); a GROUP is STORE/latents/NAME or STORE/features/NAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from storage.base.commands import run_one
from storage.base.console import run_program
from storage.commands import COMMANDS, PROG


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    return run_one(PROG, __doc__, COMMANDS, argv)


def script() -> NoReturn:
    """What is installed as `repa-storage`."""
    run_program(main, PROG)


if __name__ == "__main__":
    script()
