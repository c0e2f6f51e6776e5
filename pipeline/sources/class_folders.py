"""Which folders are the classes, asked of the names alone, alike for folders, zips and tars.

Classes are the first folders that differ: in `pets/cat/0.png` and `pets/dog/0.png` these are cat and dog, also where
`pets/cover.png` stands beside them. Files that hold labels decide instead of folders, wherever in the tree they lie.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence

from pipeline.sources.leftovers import leftover
from storage.base.errors import UserError
from storage.base.shown import shown

LABEL_FILES = ("labels.csv", "dataset.json")
SHOWN = 4  # folders in a message


def class_folders(names: Sequence[str], where: str) -> dict[str, str]:
    """The class of each name; "" for one that stands beside the folders of classes, which belongs to none.

    A folder that all share and that holds folders besides a few images is passed through: fewer than it has folders are
    strays. Raises UserError where more stand there, so that it may be a class itself.
    """
    folders = {name: name.split("/")[:-1] for name in names}
    depth = 0
    while len(shared := {parts[depth] for parts in folders.values() if len(parts) > depth}) == 1:
        below = {parts[depth + 1] for parts in folders.values() if len(parts) > depth + 1}
        n_direct = sum(len(parts) == depth + 1 for parts in folders.values())
        if not below or (len(below) == 1 and n_direct):
            break
        if n_direct >= len(below):
            raise UserError(
                f"{where}: {n_direct} images of {shown(*shared)} stand beside its folders ({listed(below)}), so it may "
                "be one class, or these may be the classes; move the images into folders, or leave them out"
            )
        depth += 1
    return {name: "".join(parts[depth : depth + 1]) for name, parts in folders.items()}


def ancestors(names: Iterable[str]) -> set[str]:
    """Every folder above the names."""
    above: set[str] = set()
    for name in names:
        folder = posixpath.dirname(name)
        while folder and folder not in above:
            above.add(folder)
            folder = posixpath.dirname(folder)
    return above


def without_images(folders: Iterable[str], class_of: Mapping[str, str]) -> list[str]:
    """A warning of a container's folders that stand beside its classes and hold no image; `class_of` is of images."""
    one_of_each = {of_one: name for name, of_one in class_of.items() if of_one}
    (of_one, name), *others = one_of_each.items()
    parts = name.split("/")
    depth = parts.index(of_one)
    if others:
        depth = next(i for i, (a, b) in enumerate(zip(parts, others[0][1].split("/"), strict=False)) if a != b)
    above = "/".join(parts[:depth])
    beside = sorted({folder for folder in folders if posixpath.dirname(folder) == above} - ancestors(class_of))
    if not beside:
        return []
    return [
        f"{len(beside)} folders beside the classes hold no image and are none ({listed(beside)}); unpacked, they would "
        "be numbered too, and labels differ from these"
    ]


def refuse_files_of_labels(names: Iterable[str], data: str, kind: str) -> None:
    """Raise UserError where one of the names is a file of labels, which folders would silently overrule."""
    for name in names:
        if posixpath.basename(name).lower() in LABEL_FILES and not leftover(name):
            folder, base = posixpath.split(name)
            fix = f"name DATA={data}/{folder}" if folder else f"rename it {base.lower()}"
            raise UserError(
                f"DATA {data} holds a file of labels, {shown(name)}, and folders that would be classes; {shown(fix)} "
                f"to read the labels from it, or pass --source {kind} to number the folders"
            )


def listed(folders: Iterable[str]) -> str:
    """A few of the folders, for a message."""
    names = sorted(folders)
    return shown(", ".join(names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
