"""WebDataset tars: a sample is the members that share a name up to its first dot, an image and what describes it.

    n01440764_10026.jpg   n01440764_10026.cls   n01440764_10026.json

The label is the number or name in `.cls`, else in `.json` (its "label", or "cls"; its "class_name" names the class),
else the integer in `.txt`, which may be a caption otherwise; --label-column names another key of `.json`, or another
member by its suffix with the dot. Members of a sample that do not stand together are refused, since that loses labels.
Samples are in the order of the shards' names, then of the archive; the key is the shard's name without suffix and the
sample's (`train-0001/n01440764_10026`). Listing reads every header and every label, shards on several threads; images
are read by their offsets.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.sources.data_entries import LISTING_THREADS, DataEntries, list_entries
from pipeline.sources.files import File, Files
from pipeline.sources.labels import AS_FOUND, Label, LabelOptions, read_label
from pipeline.sources.leftovers import leftover
from pipeline.sources.listing import EXTENSIONS, Listing, make_listing
from pipeline.sources.protocol import Sample
from pipeline.sources.tar_members import Member, first_names, location, members, read_members
from storage.base.boundary import parse_json
from storage.base.errors import UserError
from storage.base.shown import shown

LABEL_SUFFIXES = ("cls", "json", "txt")
LABEL_KEYS = ("label", "cls")  # of .json
MAX_SIDECAR_BYTES = 4 << 20
_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


@dataclass(slots=True)
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

    def __init__(self, entries: DataEntries) -> None:
        self.data, self.place = entries.data, entries.place

    @staticmethod
    def recognises(entries: DataEntries) -> bool:
        """By a first tar in which an image stands beside a label."""
        tars = entries.having(".tar")
        names = [_split(name) for name in first_names(entries.place, tars[0].path)] if tars else []
        images = {stem for stem, suffix in names if _is_image_suffix(suffix)}
        return any(stem in images and suffix in LABEL_SUFFIXES for stem, suffix in names)

    def listing(self, wanted: LabelOptions = AS_FOUND) -> Listing:
        """List every sample that has an image; members that belong to none are left out by name. Raises UserError."""
        entries = list_entries(self.data)
        shards = entries.one_split(".tar")
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            below = list(pool.map(lambda shard: read_shard(self.place, shard, wanted), shards))
        left_out = [*entries.left_out(shards), *(name for _, others in below for name in others)]
        rows = [(shard, sample) for shard, (samples, _) in zip(shards, below, strict=True) for sample in samples]
        if not rows:
            raise UserError(f"DATA {self.data} has {len(shards)} tars and no image in them")
        images = [sample.image for _, sample in rows if sample.image is not None]
        return make_listing(
            keys=[f"{shard.path[: -len('.tar')]}/{sample.name}" for shard, sample in rows],
            labels=[sample.label for _, sample in rows],
            class_names={**_names([sample for _, sample in rows], self.data), **entries.class_names()},
            locations=[location(shard.path, image) for (shard, _), image in zip(rows, images, strict=True)],
            nbytes=[image.nbytes for image in images],
            data_bytes=sum(shard.nbytes for shard in shards),
            left_out=left_out,
            wanted=wanted,
            looked_in=_looked_in(rows[0][1], wanted, self.data),
        )

    def read_many(self, locations: Sequence[str]) -> Iterator[Sample]:
        """The images' bytes, by offset."""
        return read_members(self.place, locations)

    def provenance(self) -> dict[str, str]:
        """Kind and absolute path, pattern or URL."""
        return {"kind": self.kind, "path": self.data}


def read_shard(place: Files, shard: File, wanted: LabelOptions = AS_FOUND) -> tuple[list[_Sample], list[str]]:
    """The samples of a shard, with labels, and the members that belong to none."""
    suffixes = (*LABEL_SUFFIXES, *([wanted.column[1:].lower()] if wanted.column.startswith(".") else []))
    samples: list[_Sample] = []
    others: list[str] = []
    for member in members(place, shard.path):
        stem, suffix = _split(member.name)
        is_one = member.regular and not leftover(member.name)
        if not is_one or not (_is_image_suffix(suffix) or suffix in suffixes):
            others.append(f"{shard.path}/{member.name}")
            continue
        if not samples or samples[-1].name != stem:
            samples.append(_Sample(stem))
        if suffix in suffixes:
            samples[-1].sidecars[suffix] = member
        elif samples[-1].image is None:
            samples[-1].image = member
        else:
            others.append(f"{shard.path}/{member.name}")
    if not wanted.unlabelled:
        _refuse_scattered(samples, shard)
    others += [f"{shard.path}/{m.name}" for s in samples if s.image is None for m in s.sidecars.values()]
    samples = [sample for sample in samples if sample.image is not None]
    if wanted.unlabelled:
        return samples, others
    sidecars = [(sample, suffix, member) for sample in samples for suffix, member in _decisive(sample.sidecars, wanted)]
    for _, _, member in sidecars:
        if member.nbytes > MAX_SIDECAR_BYTES:
            raise UserError(
                f"{_named(shard, member)} has {member.nbytes:,} bytes, too many for a label; mend the shard"
            )
    texts = read_members(place, [location(shard.path, member) for _, _, member in sidecars])
    for (sample, suffix, member), text in zip(sidecars, texts, strict=True):
        assert isinstance(text, bytes)
        try:
            _describe(sample, suffix, text, wanted)
        except ValueError as error:
            raise UserError(
                f"{shown(shard.path)} in DATA has a label that cannot be read, {shown(member.name)} ({error})"
            ) from error
    return samples, others


def _refuse_scattered(samples: Sequence[_Sample], shard: File) -> None:
    """Raise UserError where what describes an image stands apart from it: to each alone it would be nothing."""
    images = {sample.name: sample.image for sample in samples if sample.image is not None}
    for sample in samples:
        if sample.image is None and sample.name in images:
            (member, *_), image = sample.sidecars.values(), images[sample.name]
            raise UserError(
                f"{_named(shard, member)} is not adjacent to its image {shown(image.name)}: members of a sample must "
                "stand together, as `tar --sort=name` writes them; write the shard again, or pass --unlabelled"
            )


def _decisive(sidecars: dict[str, Member], wanted: LabelOptions) -> list[tuple[str, Member]]:
    """Those that are read: what the user names, else `.cls` and `.json`, and `.txt` where there is neither."""
    if wanted.column:
        return [(s, sidecars[s]) for s in ("json", wanted.column[1:].lower()) if s in sidecars]
    return [(s, sidecars[s]) for s in ("json", "cls") if s in sidecars] or list(sidecars.items())


def _describe(sample: _Sample, suffix: str, raw: bytes, wanted: LabelOptions) -> None:
    """Take label and class name from a sidecar. Raises ValueError where `.json` and `.cls` say different numbers."""
    if suffix == "json" and wanted.column != ".json":
        content = parse_json(Any, raw, "it", "mend it")
        if not isinstance(content, dict):
            return
        keys = (wanted.column,) if wanted.column else LABEL_KEYS
        labels = [content[key] for key in keys if content.get(key) is not None]
        sample.label = labels[0] if labels and not wanted.column.startswith(".") else None
        sample.class_name = _text_of(content.get("class_name"))
        if not isinstance(sample.label, int | float | str | None):
            raise ValueError(f"label {shown(repr(sample.label))[:60]} is not one number or name")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8; save labels as UTF-8") from None
    if suffix == "txt" and wanted.column != ".txt" and not _INTEGER.fullmatch(text):
        return
    before, label = read_label(sample.label), read_label(text)
    if isinstance(before, int) and isinstance(label, int) and before != label:
        raise ValueError(f"label {label}, and {before} in its .json")
    sample.label = label


def _names(samples: Sequence[_Sample], data: str) -> dict[Label, str]:
    """Class name by label. Raises UserError for a label with two names."""
    names: dict[Label, str] = {}
    for sample in samples:
        label = read_label(sample.label) if sample.class_name else None
        if label is not None and names.setdefault(label, sample.class_name) != sample.class_name:
            raise UserError(
                f"DATA {data}: label {shown(str(label))} has two names, {shown(names[label])} and "
                f"{shown(sample.class_name)} (in {shown(sample.name)}); mend them"
            )
    return names


def _looked_in(sample: _Sample, wanted: LabelOptions, data: str) -> str:
    """What there is where the labels should be, for a message."""
    sidecars = ", ".join(f".{suffix}" for suffix in sample.sidecars) or "nothing"
    asked = f"--label-column {wanted.column}" if wanted.column else ".cls, .json (label or cls) or .txt"
    return f"{data} was looked through for {asked}; beside the first image, {shown(sample.name)}, stands {sidecars}"


def _text_of(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, str | int | float) else ""


def _named(shard: File, member: Member) -> str:
    return f"{shown(member.name)} in {shown(shard.path)}"


def _split(name: str) -> tuple[str, str]:
    """A member's name up to the first dot after its last slash, and the rest in lower case."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _is_image_suffix(suffix: str) -> bool:
    return f".{suffix}" in EXTENSIONS
