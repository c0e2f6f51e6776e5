"""Fixtures that several tests of sources share."""

from __future__ import annotations

import pytest

from tests.pipeline.containers import (
    WRITERS,
)
from tests.pipeline.reading import SAMPLES


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sample photographs in every kind of container, each only read; what to name as DATA by name."""
    root = tmp_path_factory.mktemp("containers")
    return {name: write(root / name, SAMPLES) for name, (_, write) in WRITERS.items()}
