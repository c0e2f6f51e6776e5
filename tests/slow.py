"""Of many cases of one kind, which run by default; `make test-all` runs the others too."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases of a `parametrize`, all but those to keep marked as slow; of several arguments the first counts.

    Every one to keep must be among them: a name that changed would take its kind out of the default run.
    """
    cases = list(cases)
    firsts = [case[0] if isinstance(case, tuple) else case for case in cases]
    assert all(each in firsts for each in kept), kept
    return [
        case if first in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for first, case in zip(firsts, cases, strict=True)
    ]
