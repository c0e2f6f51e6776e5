"""What a source found: the samples, and what it saw and left out, so that nothing is skipped unsaid.

Labels are numbers, or names that are numbered (`labels.py`); a sample without one has label −1. Class names come from
the data where it has them, or from a file `classes.txt` beside it: line i names label i.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.sources.labels import (
    AS_FOUND,
    NO_LABEL,
    Label,
    LabelOptions,
    number_labels,
    odd_names,
    refuse_far_apart,
    refuse_lost,
)
from pipeline.sources.leftovers import described
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.index import Index, make_index

EXTENSIONS = frozenset(
    ".jpeg .jpg .jpe .jfif .mpo .png .apng .bmp .gif .webp .avif .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga "
    ".ico".split()
)
CLASS_NAMES_FILE = "classes.txt"
SHOWN = 3  # examples in a warning


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
    labels: Sequence[Label],
    class_names: Mapping[Any, str],
    locations: Sequence[str],
    nbytes: Sequence[int],
    data_bytes: int,
    left_out: Sequence[str] = (),
    warnings: Sequence[str] = (),
    wanted: LabelOptions = AS_FOUND,
    linked_folders: Sequence[str] = (),
    looked_in: str = "",
    where: Callable[[int], str] | None = None,
) -> Listing:
    """A listing from columns in row order. A key that comes again is numbered ("#2"), and said so.

    `labels` are as the data spells them, and so are the keys of `class_names`, which names them. `looked_in` says in
    words where the kind has its labels, unless these are its folders; `where(row)` where a row's label stands.
    `linked_folders` are links of a container that lead to its folders.

    Raises UserError for labels that are lost, far apart or could only be guessed (`labels.py`), and for names that are
    not UTF-8.
    """
    if wanted.column and not looked_in:
        raise UserError(f"--label-column {wanted.column}: labels of this kind of data stand in no column; leave it out")
    find = where or (lambda row: shown(keys[row]))
    numbered = number_labels([None] * len(keys) if wanted.unlabelled else labels, class_names, find, wanted)
    labels, class_names = numbered.labels, {} if wanted.unlabelled else numbered.class_names
    counts = Counter(labels)
    refuse_far_apart(counts, class_names)
    lost = refuse_lost(labels, find, wanted, looked_in or "this kind of data has none", bool(looked_in))
    occur = {label: name for label, name in class_names.items() if counts[label]}
    odd = odd_names(occur, in_text_order=numbered.in_text_order or not looked_in)  # folders were sorted by their source
    warnings = [*warnings, *lost, *numbered.notes, *odd]
    if linked_folders:
        warnings.append(
            f"{len(linked_folders)} links to folders are not followed in a container ({_examples(linked_folders)}); "
            "unpack it to have the images there a second time"
        )
    if leftovers := described(left_out):
        warnings.append(leftovers)
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
    try:
        index = make_index(keys, labels, [names[label] for label in labels], locations, nbytes)
    except UnicodeEncodeError as error:
        raise UserError(f"a file's name is not UTF-8, {error.object!r}; rename it") from None
    return Listing(index=index, data_bytes=data_bytes, left_out=tuple(left_out), warnings=tuple(warnings))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises UserError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


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
    return ", ".join(shown(str(item)) for item in items[:SHOWN]) + (", …" if len(items) > SHOWN else "")
