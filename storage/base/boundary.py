"""The boundary: everything that is read from disk was written by somebody else, and passes through here first.

A store or a run's folder that came from elsewhere is data. Its files are opened only when they are regular files (a
pipe would hang, a device has no end), never beyond a size that was set before, and their JSON becomes a typed object or
one line that names the file, the field and what it held. Names in it reach a terminal through `shown`, which spells out
the characters that a terminal obeys.

Types are ordinary dataclasses; pydantic checks them, in strict mode: a number where text is asked for is refused, not
converted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from storage.base.errors import StoreError
from storage.base.shown import shown

T = TypeVar("T")
MAX_JSON_BYTES = 64 << 20  # no file of ours is larger: a receipt of 100,000 rows has 2 MB
CHUNK = 1 << 20  # bytes at once of a file that has more than it says
MAX_LINE_BYTES, MAX_LINES = 4 << 20, 2_000_000
SHOWN = 60  # characters of a value that a message repeats

Count = Annotated[int, Field(ge=0, le=2**53)]  # of steps, images, blocks: exact as a float, and as JavaScript's number
Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # finite, and so are its square and its differences


def open_regular(path: str | os.PathLike[str]) -> int:
    """A file descriptor to read from, of a regular file or a link to one; never waits.

    Raises FileNotFoundError, StoreError for a folder, pipe, socket or device, and OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise not_regular(path)
    return fd


def not_regular(path: str | os.PathLike[str]) -> StoreError:
    """The error for what lies in the place of a file."""
    return StoreError(f"{os.fspath(path)} is not a regular file (a folder, pipe or device); restore the file")


def read_regular(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The whole of a regular file of at most `max_bytes`. Raises FileNotFoundError, StoreError, OSError."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        raw = os.read(fd, size + 1) if size <= max_bytes else b""
        while raw and len(raw) <= max_bytes and (more := os.read(fd, min(CHUNK, max_bytes + 1 - len(raw)))):
            raw += more  # a file of /proc says that it has no bytes
    finally:
        os.close(fd)
    if max(size, len(raw)) > max_bytes:
        raise StoreError(f"{os.fspath(path)} has more than {max_bytes:,} bytes, too many for what it should be")
    return raw


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a regular file, of which one line is in memory.

    A last line that has no end, as a kill leaves it, is handed out only if it is whole JSON. Raises FileNotFoundError,
    StoreError for lines too long or too many, OSError.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES or number > MAX_LINES:
                what = f"a line of more than {MAX_LINE_BYTES:,} bytes" if number <= MAX_LINES else "too many lines"
                raise StoreError(f"{shown(os.fspath(path))} has {what} ({number:,}); restore it or remove it")
            if line.endswith(b"\n") or _is_json(line):
                yield number, line.rstrip(b"\r\n")


def _is_json(line: bytes) -> bool:
    try:
        _adapter(Any).validate_json(line)
    except ValueError:
        return False
    return True


def parse_json(kind: type[T], raw: bytes | str, where: str, fix: str) -> T:
    """`raw` JSON as an object of the dataclass (or other type) `kind`.

    Raises StoreError in one line: `where`, the first field that is not as the type says, what it held, and `fix`.
    """
    try:
        return _adapter(cast(Hashable, kind)).validate_json(raw, strict=True)
    except ValidationError as error:
        raise StoreError(f"{shown(where)} is damaged ({_first(error)}); {fix}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{shown(where)} is damaged ({shown(str(error))[:200]}); {fix}") from None


def checked(kind: type[T], value: Any, where: str, fix: str) -> T:
    """`parse_json` for what is parsed already (attributes that zarr read, say)."""
    try:
        return _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        raise StoreError(f"{shown(where)} is damaged ({_first(error)}); {fix}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(error: ValidationError) -> str:
    """The first thing wrong: the field's path, the rule, the value."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    value = shown(repr(first["input"]))
    held = value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
    return f"{field + ': ' if field else ''}{first['msg']}, got {held}"
