"""What a source found: the samples, and what it saw and left out, so that nothing is skipped unsaid.

Labels are numbers, or names that are numbered in sorted order; a sample without one has label −1. Class names come from
the data where it has them, or from a file `classes.txt` beside it: line i names label i.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.errors import UserError
from storage.index import Index, make_index

EXTENSIONS = frozenset(
    ".jpeg .jpg .jpe .jfif .mpo .png .apng .bmp .gif .webp .avif .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga "
    ".ico".split()
)
CLASS_NAMES_FILE = "classes.txt"
NO_LABEL = -1
SHOWN = 3  # examples in a warning
_INTEGER = re.compile(r"[+-]?\d+")

Label = int | str | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Samples in row order, and the paths of files that are no samples by the source's rule.

    `data_bytes` is the size of all files that hold samples; the index has the size of each sample where it is known.
    """

    index: Index
    data_bytes: int = 0
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def make_listing(
    *,
    keys: Sequence[str],
    labels: Sequence[int],
    class_names: Mapping[int, str],
    locations: Sequence[str],
    nbytes: Sequence[int],
    data_bytes: int,
    left_out: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> Listing:
    """A listing from columns in row order. A key that comes again is numbered ("#2"), and said so.

    Raises UserError for labels below −1.
    """
    warnings = list(warnings)
    counts = Counter(labels)
    if min(counts) < NO_LABEL:
        raise UserError(f"labels must be at least 0, or {NO_LABEL} for none; found {min(counts)}")
    if counts[NO_LABEL]:
        warnings.append(f"{counts[NO_LABEL]} of {len(labels)} images have no label")
    empty = [name for label, name in sorted(class_names.items()) if not counts[label]]
    if empty:
        warnings.append(f"{len(empty)} of {len(class_names)} classes have no image, such as {_examples(empty)}")
    unnamed = sorted(label for label in counts if label != NO_LABEL and label not in class_names)
    if unnamed and class_names:
        warnings.append(f"{len(unnamed)} labels have no name, such as {_examples(unnamed)}")
    names = {NO_LABEL: "", **{label: str(label) for label in unnamed}, **class_names}
    keys, repeated = _numbered(keys)
    if repeated:
        warnings.append(f"{len(repeated)} keys come more than once, such as {_examples(repeated)}; numbered #2, #3, …")
    index = make_index(keys, labels, [names[label] for label in labels], locations, nbytes)
    return Listing(index=index, data_bytes=data_bytes, left_out=tuple(left_out), warnings=tuple(warnings))


def number_labels(values: Sequence[Label]) -> tuple[list[int], dict[int, str]]:
    """Labels as numbers, and the names that were numbered: integers stay as they are, names count in sorted order."""
    given = {value for value in values if value is not None and value != ""}
    if all(isinstance(value, int) or _INTEGER.fullmatch(value) for value in given):
        return [NO_LABEL if value is None or value == "" else int(value) for value in values], {}
    names = sorted({str(value) for value in given})
    numbers = {name: number for number, name in enumerate(names)}
    return [NO_LABEL if value is None or value == "" else numbers[str(value)] for value in values], dict(
        enumerate(names)
    )


def is_image(path: str) -> bool:
    """Whether the name ends as those of pictures do; what the bytes are is found out when they are decoded."""
    return "." + path.rpartition(".")[2].lower() in EXTENSIONS


def _numbered(keys: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """The keys with "#2", "#3", … after those that came before, and which these are."""
    given = set(keys)
    if len(given) == len(keys):
        return keys, []
    times: Counter[str] = Counter()
    numbered = []
    for key in keys:
        times[key] += 1
        while times[key] > 1 and f"{key}#{times[key]}" in given:
            times[key] += 1
        numbered.append(key if times[key] == 1 else f"{key}#{times[key]}")
    return numbered, sorted(key for key, n in times.items() if n > 1)


def _examples(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:SHOWN])) + (", …" if len(items) > SHOWN else "")
