"""A command as a user runs it, in this process: a new one takes seconds to import what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from storage.base.console import run_command


def run_here(
    main: Callable[[Sequence[str]], int], prog: str, argv: Sequence[str | Path], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit status, output and errors of `prog`, whose `main` this is. A traceback is the test's."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(main, prog, [str(word) for word in argv])
    printed = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, printed.out, printed.err
