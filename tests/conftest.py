"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores import make_store


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """A complete store: 40 rows, 1 view, latents/tiny-vae (8, 16, 16) and features/tiny-vit (64 tokens of 24)."""
    root = tmp_path / "store"
    make_store(root)
    return root


@pytest.fixture(scope="session")
def shared_tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store made once, for tests that only read it."""
    root = tmp_path_factory.mktemp("shared") / "store"
    make_store(root)
    return root
