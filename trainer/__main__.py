"""`python -m trainer`: stage two, from feature stores to images and measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from storage.base.commands import run_one
from storage.base.console import run_program
from trainer.commands import COMMANDS, PROG


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    # OpenMP's threads spin while they wait for each other, and where other programs compute too they take the cores
    # from those they wait for. A short spin: sit-tiny-2 on 64 tokens beside two busy loops on two cores takes 2.3 to
    # 3.4 steps a second instead of 0.8 to 1.3, and alone 5.5 beside 5.7; without any spin it is 4.5. Read when torch is
    # loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return run_one(PROG, __doc__, COMMANDS, argv)


def script() -> NoReturn:
    """What is installed as `repa-trainer`."""
    run_program(main, PROG)


if __name__ == "__main__":
    script()
