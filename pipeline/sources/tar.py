"""Tars of classes: the original `ILSVRC2012_img_train.tar`, a tar of one tar a class, or a folder of such class tars.

Nothing is unpacked: images are read by their offsets. Classes are numbered in the sorted order of the class tars'
names, and samples sorted by class, then by name, so that labels, keys (`n01440764/n01440764_10026.JPEG`) and rows agree
with those of the unpacked ImageFolder tree. Listing reads every member's header, class tars on several threads.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from pipeline.sources.class_folders import listed, refuse_files_of_labels
from pipeline.sources.data_entries import LISTING_THREADS, DataEntries, list_entries
from pipeline.sources.labels import AS_FOUND, LabelOptions
from pipeline.sources.leftovers import leftover
from pipeline.sources.listing import Listing, is_image, make_listing
from pipeline.sources.protocol import Sample
from pipeline.sources.tar_members import Member, first_names, location, members, read_members
from storage.base.errors import UserError
from storage.base.shown import shown

SHARD = re.compile(r"((?:.*[-_.])?)(\d{4,})")  # train-000017: prefix and number
LABEL_SUFFIX = ".cls"  # WebDataset's, which is recognised by the first members only


@dataclass(frozen=True)
class _ClassTar:
    """A class, and where its tar lies: bytes [start, end) of a file, None for all of it."""

    name: str
    path: str
    start: int = 0
    end: int | None = None


class ClassTars:
    """A folder (or pattern) of tars, one a class and named after it. `location` is `file.tar@offset+bytes`."""

    kind = "class-tars"
    expects = "a folder of .tar files of images, one a class"
    named = False  # whether the user chose this kind

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By several tars of which the first holds images and nothing else."""
        tars = entries.having(".tar")
        return len(tars) > 1 and all(is_image(name) for name in first_names(entries.place, tars[0].path))

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every image; members with another extension are left out by name. Raises UserError."""
        entries = list_entries(self.data)
        tars, left_out = self._class_tars(entries)
        tars = sorted(tars, key=lambda tar: tar.name)
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            below = list(pool.map(self._members, tars))
        images: list[tuple[int, str, Member]] = []
        linked: list[str] = []
        for label, (tar, of_tar) in enumerate(zip(tars, below, strict=True)):
            for member in sorted(of_tar, key=lambda member: member.name):
                key = f"{tar.name}/{member.name}"
                is_label = member.name.lower().endswith(LABEL_SUFFIX) and not leftover(member.name)
                if is_label and not wanted.unlabelled:
                    raise UserError(
                        f"{tar.path} in DATA holds labels of its images ({member.name}), which class tars do not have; "
                        "pass --source webdataset, or --unlabelled to leave every label out"
                    )
                if member.regular and is_image(member.name) and not leftover(member.name):
                    images.append((label, key, member))
                else:
                    left_out.append(key)
                    linked += [key] if member.to_folder else []
        if not images:
            raise UserError(f"DATA {self.data} has {len(tars)} class tars and no image in them")
        if not wanted.unlabelled:
            self._refuse_names_that_come_twice(tars)
        if not self.named and not wanted.unlabelled:
            refuse_files_of_labels(left_out, self.data, self.kind)
            self._refuse_what_is_no_class(tars, [(label, member.name) for label, _, member in images])
        return make_listing(
            keys=[key for _, key, _ in images],
            labels=[label for label, _, _ in images],
            class_names={label: tar.name for label, tar in enumerate(tars)},
            locations=[location(tars[label].path, member) for label, _, member in images],
            nbytes=[member.nbytes for _, _, member in images],
            data_bytes=sum(file.nbytes for file in entries.having(".tar")),
            left_out=left_out,
            linked_folders=linked,
            wanted=wanted,
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The members' bytes, by offset."""
        return read_members(self.place, locations)

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path, pattern or URL."""
        return {"kind": self.kind, "path": self.data}

    def _class_tars(self, entries: DataEntries) -> tuple[list[_ClassTar], list[str]]:
        """The class tars, and what is none."""
        tars = entries.one_split(".tar")
        return [_ClassTar(posixpath.basename(tar.path)[: -len(".tar")], tar.path) for tar in tars], list(
            entries.left_out(tars)
        )

    def _refuse_names_that_come_twice(self, tars: Sequence[_ClassTar]) -> None:
        """Raise UserError where two tars are called alike, in different folders: one class, or two?"""
        for before, tar in pairwise(tars):  # sorted by name
            if tar.name == before.name:
                raise UserError(
                    f"DATA {self.data} has two tars called {shown(tar.name)}.tar, and a class is named after its tar; "
                    "join them with `tar -A`, or rename one"
                )

    def _refuse_what_is_no_class(self, tars: Sequence[_ClassTar], images: Sequence[tuple[int, str]]) -> None:
        """Raise UserError where tars seem to be parts of a data set: numbered, or with the same folders in several."""
        shards = [SHARD.fullmatch(tar.name) for tar in tars]
        numbers = [int(shard[2]) for shard in shards if shard]
        if len({shard and shard[1] for shard in shards}) == 1 and numbers == [*range(len(tars))] and len(tars) > 1:
            raise UserError(
                f"DATA {self.data} has {len(tars)} tars that are numbered as shards are ({shown(tars[0].name)}, …) and "
                f"no labels in them; pass --source {self.kind} if each is a class, or --unlabelled"
            )
        names: list[list[str]] = [[] for _ in tars]
        for label, name in images:
            names[label].append(name)
        folders = [_folders(below) for below in names]
        times = Counter(folder for below in folders for folder in below)
        shared = sorted(folder for folder, n in times.items() if n > 1)
        if shared and max(map(len, folders)) > 1:
            raise UserError(
                f"DATA {self.data}: the same folders are in several tars ({listed(shared)}), so that these may be the "
                f"classes; unpack the tars into one folder, or pass --source {self.kind} if each tar is a class"
            )

    def _members(self, tar: _ClassTar) -> list[Member]:
        return list(members(self.place, tar.path, tar.start, tar.end))


def _folders(names: Sequence[str]) -> set[str]:
    """The folders that names lie in, below those that all of them share."""
    parts = [name.split("/")[:-1] for name in names]
    while parts and all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return {part[0] for part in parts if part}


class TarOfTars(ClassTars):
    """One tar whose members are class tars; offsets are those in the outer file."""

    kind = "tar-of-tars"
    expects = "a .tar of one .tar a class (ILSVRC2012_img_train.tar)"

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By one tar whose first member is a tar."""
        tars = entries.having(".tar")
        return len(tars) == 1 and any(name.endswith(".tar") for name in first_names(entries.place, tars[0].path)[:1])

    def _class_tars(self, entries: DataEntries) -> tuple[list[_ClassTar], list[str]]:
        outer = entries.one_split(".tar")
        if len(outer) != 1:
            raise UserError(f"DATA {self.data} has {len(outer)} tars; a tar of tars is one file, name it")
        left_out = list(entries.left_out(outer))
        tars = []
        for member in members(self.place, outer[0].path):
            if member.regular and member.name.lower().endswith(".tar") and not leftover(member.name):
                if member.extents:
                    raise UserError(
                        f"{shown(outer[0].path)} in DATA holds {shown(member.name)} as a sparse file, whose "
                        "members have no place of their own; repack it without --sparse"
                    )
                name = posixpath.basename(member.name)[: -len(".tar")]
                tars.append(_ClassTar(name, outer[0].path, member.start, member.start + member.nbytes))
            else:
                left_out.append(member.name)
        return tars, left_out
