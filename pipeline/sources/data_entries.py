"""What DATA names, seen from above: one file, the files that match a pattern, or the entries of a folder.

Looking costs one directory scan. It is what the kinds of sources recognise themselves by.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.sources.files import File, Files, LocalFiles, RemoteFiles, matches, walk
from pipeline.sources.listing import CLASS_NAMES_FILE, decode_text
from storage.base.errors import UserError
from storage.roots import is_url

PATTERN = re.compile(r"[*?\[]")
SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test)(?![a-z])")
CONTAINERS = (".tar", ".parquet", ".h5", ".hdf5", ".zip")
SHOWN = 4  # examples in a message
MAX_NAMES_BYTES = 16 << 20  # of classes.txt
LISTING_THREADS = 16  # enough to hide a network file system's latency
SLOW_ENTRY_S = 100e-6  # a local disk takes a tenth of this for a file, a server some milliseconds


@dataclass(frozen=True)
class DataEntries:
    """`files` are those that DATA names or matches, or that lie directly below the folder it names."""

    data: str
    place: Files
    folders: tuple[str, ...]
    files: tuple[File, ...]
    is_folder: bool
    leftovers: tuple[str, ...] = ()

    def having(self, *suffixes: str) -> list[File]:
        """The files with one of these suffixes (lower case, with the dot)."""
        return [file for file in self.files if file.path.lower().endswith(suffixes)]

    def one_split(self, *suffixes: str) -> list[File]:
        """The same, none refused: raises UserError for none, and for the files of several splits in one folder."""
        files = self.having(*suffixes)
        if not files:
            raise UserError(f"DATA {self.data} has no {' or '.join(suffixes)} file; it holds {self.summary()}")
        splits = {match.group(1) for file in files if (match := SPLIT.search(os.path.basename(file.path).lower()))}
        if self.is_folder and len(splits) > 1:
            raise UserError(
                f"DATA {self.data} holds the files of several splits ({', '.join(sorted(splits))}); "
                f"name one by a pattern, such as {self.data}/{sorted(splits)[-1]}*{suffixes[0]}"
            )
        return files

    def walk(self) -> tuple[list[list[File]], list[str]]:
        """(the files at any depth below each folder, sorted by path; the leftovers of all of them).

        Object stores are asked on several threads. Elsewhere the first folder is walked alone and timed: a local disk
        answers sooner than threads take turns (1,281,000 files: 11 s instead of 30), a network file system does not.
        """
        start_s = time.perf_counter()
        walked = [walk(self.place, folder) for folder in self.folders[:1]]
        n_seen = sum(len(files) + len(leftovers) for files, leftovers in walked)
        rest = self.folders[1:]
        is_local = isinstance(self.place, LocalFiles)
        if is_local and time.perf_counter() - start_s < SLOW_ENTRY_S * (n_seen + 1):
            walked += [walk(self.place, folder) for folder in rest]
        else:
            with ThreadPoolExecutor(LISTING_THREADS) as pool:
                walked += pool.map(lambda folder: walk(self.place, folder), rest)
        return [files for files, _ in walked], [path for _, leftovers in walked for path in leftovers]

    def class_names(self) -> dict[int, str]:
        """The names in `classes.txt` beside the files, if there is one."""
        try:
            with self.place.open(CLASS_NAMES_FILE) as file:
                where = f"{self.place.root}/{CLASS_NAMES_FILE}"
                text = decode_text(file.read(MAX_NAMES_BYTES + 1), where)
                if len(text) > MAX_NAMES_BYTES:
                    raise UserError(f"{where} has more than {MAX_NAMES_BYTES:,} bytes, too many for names of classes")
                lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")  # at no other character
                return {label: line.strip() for label, line in enumerate(lines) if text.strip()}
        except FileNotFoundError:
            return {}

    def left_out(self, taken: Sequence[File]) -> tuple[str, ...]:
        """The files that are none of those taken, the folders, which are not entered, and the leftovers."""
        known = {CLASS_NAMES_FILE, *(file.path for file in taken)}
        others = tuple(file.path for file in self.files if file.path not in known)
        return (*(f"{path}/" for path in self.folders), *others, *self.leftovers)

    def summary(self) -> str:
        """In words, for messages: how many of what, with examples."""
        suffixes = Counter(os.path.splitext(file.path)[1].lower() or "no suffix" for file in self.files)
        parts = [f"{n} × {suffix}" for suffix, n in suffixes.most_common(SHOWN)]
        if self.folders:
            parts.append(f"{len(self.folders)} folders ({', '.join(self.folders[:SHOWN])})")
        return ", ".join(parts) or "nothing"


def refuse_splits(data: str, folders: Sequence[str], paths: Iterable[str]) -> None:
    """Raise UserError when the folders that would be classes are a data set's splits, with the classes below them."""
    if all(SPLIT.fullmatch(folder.lower()) for folder in folders) and any(path.count("/") > 1 for path in paths):
        raise UserError(
            f"DATA {data} holds splits ({', '.join(folders[:SHOWN])}) and not class folders; name one of them by itself"
        )


def list_entries(data: str) -> DataEntries:
    """What an absolute path, pattern or URL names. Raises UserError for nothing, OSError when it is out of reach."""
    data = data.removeprefix("file://")
    remote = is_url(data)
    if data.startswith(("http://", "https://")) and not data.lower().endswith(CONTAINERS):
        raise UserError(f"DATA {data}: an http server cannot list files; name one {', '.join(CONTAINERS)} file")
    if PATTERN.search(data) and (remote or not os.path.exists(data)):
        fixed = re.split(PATTERN, data, maxsplit=1)[0].rpartition("/")[0] or "/"
        place: Files = RemoteFiles(fixed) if remote else LocalFiles(fixed)
        files, leftovers = matches(place, data[len(fixed) :].lstrip("/"))
        if not files:
            raise UserError(f"DATA {data}: no file matches the pattern")
        return DataEntries(data, place, (), tuple(files), is_folder=False, leftovers=tuple(leftovers))
    return _list_remotely(data) if remote else _list_locally(data)


def _list_locally(data: str) -> DataEntries:
    if not os.path.exists(data):
        raise UserError(f"DATA {data} does not exist; name a folder, a file, a pattern or a URL of images")
    if not os.path.isdir(data):
        place = LocalFiles(os.path.dirname(data))
        return DataEntries(data, place, (), (File(os.path.basename(data), os.path.getsize(data)),), is_folder=False)
    place = LocalFiles(data)
    folders, files, leftovers = place.entries("")
    return DataEntries(data, place, tuple(folders), tuple(files), is_folder=True, leftovers=tuple(leftovers))


def _list_remotely(data: str) -> DataEntries:
    place = RemoteFiles(data)
    try:
        nbytes = place.size("")
        if nbytes is not None:
            parent, name = data.rsplit("/", 1)
            return DataEntries(data, RemoteFiles(parent), (), (File(name, nbytes),), is_folder=False)
        folders, files, leftovers = place.entries("")
    except FileNotFoundError:
        raise UserError(f"DATA {data} does not exist") from None
    return DataEntries(data, place, tuple(folders), tuple(files), is_folder=True, leftovers=tuple(leftovers))
