"""A folder of images and nothing that labels them: for models without classes, when the user says so.

Samples are the images directly below the folder, sorted by name, which is the key; other files are left out. Without
--unlabelled that is refused, since a folder like this one is more often a labelled data set that lost its labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.sources.data_entries import CONTAINERS, DataEntries, list_entries
from pipeline.sources.files import Part
from pipeline.sources.labels import AS_FOUND, LabelOptions
from pipeline.sources.labels_file import CSV_FILE, JSON_FILE
from pipeline.sources.listing import Listing, is_image, make_listing
from pipeline.sources.protocol import Sample
from storage.base.errors import UserError


class FlatFolder:
    """Images of one folder. `location` is the file's name."""

    kind = "flat-folder"
    expects = "a folder of images alone, with --unlabelled"

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By images, beside no folder, no container and no file of labels."""
        others = entries.folders or entries.having(CSV_FILE, JSON_FILE, *CONTAINERS)
        return entries.is_folder and not others and any(is_image(file.path) for file in entries.files)

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every image. Raises UserError where there is none, and without --unlabelled."""
        entries = list_entries(self.data)
        images = [file for file in entries.files if is_image(file.path)]
        if not images:
            raise UserError(f"DATA {self.data} has no image directly below it; it holds {entries.summary()}")
        if not wanted.unlabelled:
            raise UserError(
                f"DATA {self.data} holds {entries.summary()} and nothing that labels them; sort them into a folder a "
                f"class, put a {CSV_FILE} beside them (file,label), or pass --unlabelled to store no labels (−1)"
            )
        return make_listing(
            keys=[file.path for file in images],
            labels=[None] * len(images),
            class_names={},
            locations=[file.path for file in images],
            nbytes=[file.nbytes for file in images],
            data_bytes=sum(max(0, file.nbytes) for file in images),
            left_out=entries.left_out(images),
            wanted=wanted,
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The files' bytes."""
        return self.place.read_many([Part(location) for location in locations])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path or URL."""
        return {"kind": self.kind, "path": self.data}
