"""What the `config.json` of a diffusers autoencoder says, read as data: diffusers is not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.base.shown import shown

CONFIG_FILE = "config.json"
RAE = "AutoencoderRAE"


def holds_rae(directory: Path) -> bool:
    """Whether a diffusers directory is an AutoencoderRAE's, whose latents are features (`rae.py`)."""
    return (directory / CONFIG_FILE).is_file() and read_settings(directory).get("_class_name") == RAE


def read_settings(directory: Path) -> dict[str, Any]:
    """What `config.json` says. Raises StoreError."""
    path = directory / CONFIG_FILE
    settings = parse_json(dict[str, Any], read_regular(path), str(path), "copy the folder again")
    name = settings.get("_class_name", "AutoencoderKL")
    if not isinstance(name, str):
        raise UserError(f"{path}: _class_name must be a name, got {shown(str(name)[:60])}; copy the folder again")
    return settings
