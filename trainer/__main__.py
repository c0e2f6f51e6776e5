"""`python -m trainer`: stage two, from feature stores to images and measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence

from storage.base.commands import run_one
from storage.base.console import run_command
from trainer.commands import COMMANDS, PROG


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    # Threads that spin while they wait for each other take the cores from those they wait for, where others compute
    # too: a step of the demo's model beside two busy loops took 1.3 s, and takes 0.26 s. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return run_one(PROG, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run_command(main, PROG)
