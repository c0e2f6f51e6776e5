"""A Hugging Face cache on disk as the hub's client lays it out, made without the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

REVISION = "0" * 40


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def put_in_cache(cache: Path, repository: str, file: Path, name: str) -> None:
    """Make `file` the repository's file `name` at its main revision."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    target = folder / "snapshots" / REVISION / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
