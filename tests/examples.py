"""How many examples hypothesis tries: all under `make test-all`, fewer in the runs that somebody waits for."""

from __future__ import annotations

from hypothesis import settings

DEFAULT = 100  # hypothesis's own number
SHARES = {"all": 1, "default": 4, "quick": 10}  # one in so many
LEAST = 5
_share = SHARES["all"]


def choose(run: str) -> None:
    """Set the share, before tests are collected; of tests that name no number too."""
    global _share
    _share = SHARES[run]
    settings.register_profile(run, settings.default, max_examples=examples(DEFAULT))
    settings.load_profile(run)


def examples(n: int) -> int:
    """For `settings(max_examples=…)`: of `n`, as many as this run tries."""
    return max(min(n, LEAST), n // _share)
