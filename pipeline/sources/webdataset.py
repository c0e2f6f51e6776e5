"""WebDataset tars: a sample is the members that share a name up to its first dot, an image and what describes it.

    n01440764_10026.jpg   n01440764_10026.cls   n01440764_10026.json

The label is the integer or name in `.cls`, else in `.json` (its "label", or "cls"; its "class_name" names the class),
else the integer in `.txt`, which may be a caption otherwise. Samples are in the order of the shards' names, then of the
archive; the key is the shard's name without suffix and the sample's (`train-0001/n01440764_10026`). Listing reads every
header and every label, shards on several threads; images are read by their offsets.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.sources.files import File, Files
from pipeline.sources.found import LISTING_THREADS, Found, look
from pipeline.sources.listing import EXTENSIONS, Label, Listing, make_listing, number_labels
from pipeline.sources.protocol import Sample
from pipeline.sources.tar_members import Member, first_names, location, members, part
from storage.errors import UserError

LABEL_SUFFIXES = ("cls", "json", "txt")
_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


@dataclass
class _Sample:
    """A sample in the making."""

    name: str
    image: Member | None = None
    label: Label = None
    class_name: str = ""
    sidecars: dict[str, Member] = field(default_factory=dict)


class WebDataset:
    """One or more WebDataset shards. `location` is `file.tar@offset+bytes`."""

    kind = "webdataset"
    expects = "WebDataset .tar shards (x.jpg beside x.cls, x.json or x.txt)"

    def __init__(self, found: Found) -> None:
        self.data, self.place = found.data, found.place

    @staticmethod
    def recognises(found: Found) -> bool:
        """By a first tar in which an image stands beside a label."""
        tars = found.having(".tar")
        names = [_split(name) for name in first_names(found.place, tars[0].path)] if tars else []
        images = {stem for stem, suffix in names if _is_image_suffix(suffix)}
        return any(stem in images and suffix in LABEL_SUFFIXES for stem, suffix in names)

    def listing(self) -> Listing:
        """List every sample that has an image; members that belong to none are left out by name. Raises UserError."""
        found = look(self.data)
        shards = found.one_split(".tar")
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            below = list(pool.map(lambda shard: read_shard(self.place, shard), shards))
        left_out = [*found.left_out(shards), *(name for _, others in below for name in others)]
        rows = [(shard, sample) for shard, (samples, _) in zip(shards, below, strict=True) for sample in samples]
        if not rows:
            raise UserError(f"DATA {self.data} has {len(shards)} tars and no image in them")
        labels, names = number_labels([sample.label for _, sample in rows])
        named = {label: s.class_name for label, (_, s) in zip(labels, rows, strict=True) if s.class_name}
        images = [sample.image for _, sample in rows if sample.image is not None]
        return make_listing(
            keys=[f"{shard.path[: -len('.tar')]}/{sample.name}" for shard, sample in rows],
            labels=labels,
            class_names={**names, **named, **found.class_names()},
            locations=[location(shard.path, image) for (shard, _), image in zip(rows, images, strict=True)],
            nbytes=[image.nbytes for image in images],
            data_bytes=sum(shard.nbytes for shard in shards),
            left_out=left_out,
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The images' bytes, by offset."""
        return self.place.read_many([part(location) for location in locations])

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path, pattern or URL."""
        return {"kind": self.kind, "path": self.data}


def read_shard(place: Files, shard: File) -> tuple[list[_Sample], list[str]]:
    """The samples of a shard, with labels, and the members that belong to none."""
    samples: list[_Sample] = []
    others: list[str] = []
    for member in members(place, shard.path):
        stem, suffix = _split(member.name)
        if not member.regular or not (_is_image_suffix(suffix) or suffix in LABEL_SUFFIXES):
            others.append(f"{shard.path}/{member.name}")
            continue
        if not samples or samples[-1].name != stem:
            samples.append(_Sample(stem))
        if suffix in LABEL_SUFFIXES:
            samples[-1].sidecars[suffix] = member
        elif samples[-1].image is None:
            samples[-1].image = member
        else:
            others.append(f"{shard.path}/{member.name}")
    others += [f"{shard.path}/{m.name}" for s in samples if s.image is None for m in s.sidecars.values()]
    samples = [sample for sample in samples if sample.image is not None]
    sidecars = [(sample, suffix, member) for sample in samples for suffix, member in _decisive(sample.sidecars)]
    parts = [part(location(shard.path, member)) for _, _, member in sidecars]
    for (sample, suffix, member), text in zip(sidecars, place.read_many(parts), strict=True):
        assert isinstance(text, bytes)
        try:
            _describe(sample, suffix, text.decode())
        except ValueError as error:
            raise UserError(f"{shard.path} in DATA has a label that cannot be read, {member.name} ({error})") from error
    return samples, others


def _decisive(sidecars: dict[str, Member]) -> list[tuple[str, Member]]:
    """Those that are read: `.cls` and `.json`, and `.txt` where there is neither."""
    return [(s, sidecars[s]) for s in ("json", "cls") if s in sidecars] or list(sidecars.items())


def _describe(sample: _Sample, suffix: str, text: str) -> None:
    """Take label and class name from a sidecar; `.cls` comes after `.json` and so overrides it."""
    if suffix == "json":
        content = json.loads(text)
        if isinstance(content, dict):
            sample.label = content.get("label", content.get("cls"))
            sample.class_name = str(content.get("class_name", ""))
        if not isinstance(sample.label, int | str | None):
            raise ValueError(f"label {sample.label!r}")
    elif suffix == "cls" or _INTEGER.fullmatch(text):
        sample.label = text.strip()


def _split(name: str) -> tuple[str, str]:
    """A member's name up to the first dot after its last slash, and the rest in lower case."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _is_image_suffix(suffix: str) -> bool:
    return f".{suffix}" in EXTENSIONS
