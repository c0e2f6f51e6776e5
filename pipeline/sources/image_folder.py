"""An ImageFolder tree: one sub-folder a class, images below it (ImageNet's `train/n01440764/*.JPEG`).

Classes are numbered in the sorted order of their folder names, as torchvision's ImageFolder does, so that labels agree
with the public checkpoints'. Samples are sorted by class, then by path. Sorting compares code points and so does not
depend on the locale. Listing costs one directory scan a folder and one stat a file, on several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.sources.class_folders import class_folders, listed, refuse_files_of_labels
from pipeline.sources.data_entries import DataEntries, list_entries, refuse_splits
from pipeline.sources.files import Part
from pipeline.sources.labels import AS_FOUND, LabelOptions
from pipeline.sources.labels_file import LabelsFile
from pipeline.sources.listing import EXTENSIONS, Listing, is_image, make_listing
from pipeline.sources.protocol import Sample
from storage.base.errors import UserError
from storage.base.shown import shown


class ImageFolder:
    """Images below `root/<class>/`, at any depth. `location` is the path below `root`, and so is the key."""

    kind = "image-folder"
    expects = "a folder with one sub-folder of images a class"
    named = False  # whether the user chose this kind

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By its sub-folders, unless a file holds the labels."""
        return bool(entries.folders) and not LabelsFile.recognises(entries)

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every image; files with another extension are left out by name. Raises UserError when there is none."""
        entries = list_entries(self.data)
        if not entries.folders:
            raise UserError(f"DATA {self.data} has no sub-folder; it needs one a class, such as {self.data}/n01440764")
        below, leftovers = entries.walk()
        images = [(label, file) for label, files in enumerate(below) for file in files if is_image(file.path)]
        left_out = [file.path for files in below for file in files if not is_image(file.path)]
        if not images:
            seen = f"; there is {left_out[0]}" if left_out else ""
            raise UserError(
                f"DATA {self.data} has {len(below)} class folders and no image in them "
                f"(by extension: {' '.join(sorted(EXTENSIONS))}){seen}"
            )
        paths = [file.path for _, file in images]
        refuse_splits(self.data, entries.folders, paths)
        if not self.named and not wanted.unlabelled:
            refuse_files_of_labels([*(file.path for file in entries.files), *left_out], self.data, self.kind)
            self._refuse_one_folder(entries, paths)
        return make_listing(
            keys=paths,
            labels=[label for label, _ in images],
            class_names=dict(enumerate(entries.folders)),
            locations=paths,
            nbytes=[file.nbytes for _, file in images],
            data_bytes=sum(max(0, file.nbytes) for _, file in images),
            left_out=[*(file.path for file in entries.files), *left_out, *entries.leftovers, *leftovers],
            wanted=wanted,
        )

    def _refuse_one_folder(self, entries: DataEntries, paths: Sequence[str]) -> None:
        """Raise UserError where all images lie below one folder, whose own folders seem to be the classes."""
        folder, *others = sorted({path.partition("/")[0] for path in paths})
        if others:
            return
        classes = {class_of for class_of in class_folders(paths, f"DATA {self.data}").values() if class_of}
        if classes - {folder}:
            raise UserError(
                f"DATA {self.data} has all images below one folder, {shown(folder)}, whose folders seem to be the "
                f"classes ({listed(classes)}); name {shown(self.data)}/{shown(folder)}, or pass --source {self.kind} "
                "to make it one class"
            )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The files' bytes."""
        return self.place.read_many([Part(location) for location in locations])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}
