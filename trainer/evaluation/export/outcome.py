"""What `export` prints when it has ended: which files there are, and a command that opens them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from storage import space
from storage.base import ending

OPENED = {
    "safetensors": 'from safetensors import safe_open; print(*safe_open({}, "np").keys(), sep="\\n")',
    "diffusers": (
        "from diffusers import DiffusionPipeline as Pipeline; "
        "print(Pipeline.from_pretrained({}, trust_remote_code=True))"
    ),
}


def outcome(folder: Path, to: str) -> str:
    """A few lines."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    what = {"safetensors": "averaged weights in one file", "diffusers": "a diffusers pipeline"}[to]
    rows = {
        "exported": f"{what}, {space.size(sum(path.stat().st_size for path in files))}",
        "folder": folder,
        "files": ", ".join(sorted(str(path.relative_to(folder)) for path in files)),
    }
    return ending.rows(rows)


def look_at(folder: Path, to: str) -> str:
    """A command that opens the export; of a pipeline that has its VAE elsewhere, the page that says how."""
    if to == "diffusers" and not (folder / "vae").is_dir():
        return shlex.join(["cat", str(folder / "README.md")])
    file = folder / "ema.safetensors" if to == "safetensors" else folder
    return shlex.join(["python", "-c", OPENED[to].format(json.dumps(str(file)))])
