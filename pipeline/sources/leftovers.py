"""What operating systems, file servers and desktops leave beside pictures: thumbnails, bins, resource forks.

Leftovers look like pictures and classes (`@eaDir` holds a thumbnail of every photograph, `._cat.png` stands beside
`cat.png`), so every kind of source leaves them out alike, at any depth, and says so. Only these exact names count: a
class may be called "trash". Names that begin with a dot are hidden, and are nobody's samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

NAMES = frozenset(
    {
        "__macosx",  # macOS's Finder, in zips
        "icon\r",  # macOS, a folder's icon
        "thumbs.db",  # Windows
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",  # ext2 to ext4
        "@eadir",  # Synology: thumbnails
        "#recycle",
        "#snapshot",
        "@tmp",
        "@sharesnap",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "@transcode",
        "@upload_cache",
        "@__thumb",
        "~snapshot",  # NetApp
        "found.000",  # Windows' chkdsk
        "network trash folder",  # AFP
        "temporary items",
        "__pycache__",
    }
)
OWN_FILE = ".recipe.json"  # of the built-in photographs (`photos.py`), not worth a word
HIDDEN = "."  # .DS_Store, ._cat.png, .Trash-1000, .ipynb_checkpoints, .snapshot, .thumbnails, …
SHOWN = 5  # names in a message


def leftover(path: str) -> str:
    """The part of a path that makes it a leftover, "" where none does. Parts are compared without regard to case."""
    for part in path.split("/"):
        if part.casefold() in NAMES or (part.startswith(HIDDEN) and part not in (".", "..")):
            return part
    return ""


def described(paths: Iterable[str]) -> str:
    """The leftovers among the paths, in words: how many of which; "" where there is none."""
    parts = [part for path in paths if (part := leftover(path))]
    if not parts:
        return ""
    named = Counter("._*" if part.startswith("._") else part for part in parts).most_common()
    listed = ", ".join(f"{name!r} {n}×" for name, n in named[:SHOWN]) + (", …" if len(named) > SHOWN else "")
    return f"{len(parts)} leftovers of operating systems and file servers are left out: {listed}"
