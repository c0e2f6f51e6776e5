"""Whether what is to be written fits on the disk, asked before work begins."""

from __future__ import annotations

import math
import shutil

from storage.base.errors import UserError
from storage.roots import Root

MARGIN = 1.05  # metadata, receipts and the index


def free_bytes(root: Root) -> float:
    """Free bytes of the file system that the root lies or will lie on; infinite on an object store."""
    if root.path is None:
        return math.inf
    existing = next(path for path in (root.path, *root.path.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(root: Root, n_bytes: int, free: float, fix: str) -> None:
    """Raise UserError, naming both sizes, when `n_bytes` of arrays are more than what is free; `fix` is the advice."""
    if n_bytes * MARGIN > free:
        raise UserError(f"{root} has {size(free)} free and {size(n_bytes)} are to be written; free space or {fix}")


def size(n_bytes: float) -> str:
    """As people read it."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
