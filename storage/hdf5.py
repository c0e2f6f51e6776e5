"""HDF5 files that somebody else may have written: data sets whose bytes lie in the file itself, and nothing else.

An HDF5 file can name other files (external links, external raw storage, virtual data sets), and reading such a data set
puts whatever the user may read into a store; through a Python file object a virtual one ends the process. Links are
followed here one by one, and a data set is looked at before its shape or a byte of it is asked for. What was declared
and never written, which HDF5 hands out as zeros, is refused too, and what would unpack to more than `MAX_CHUNK_BYTES`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from storage.base.errors import UserError
from storage.base.shown import shown

MAX_CHUNK_BYTES = 512 << 20  # a chunk is unpacked whole, however little of it is asked for
MAX_SOFT_LINKS = 16
MAX_TEXT_BYTES = 64 << 20  # of names of a fixed length that are read at once
MAX_NAME_BYTES = 4000  # of one name
FEWEST_ROWS, MOST_ROWS = 8, 128  # of any length that are read at once
SHOWN_MEMBERS = 12
OWN_FILE = "copy the data into the file itself"


@contextmanager
def hdf5_errors(where: str) -> Iterator[None]:
    """What h5py raises for a damaged file becomes one line that names the file, as does a UserError without it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise UserError(f"{where} is no whole HDF5 file ({reason}); fetch it again, or repack it") from error


def find_member(group: h5py.Group, path: str) -> Any:
    """What stands at a path below a group, or None. Raises UserError for a link that leaves the file."""
    here: Any = group
    parts, n_soft = deque(path.split("/")), 0
    while parts:
        part = parts.popleft()
        if part in ("", "."):
            continue
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise UserError(
                f"{_quoted(path)} is an external link, to {_quoted(link.path)} in the file {_quoted(link.filename)}, "
                f"which is not followed; {OWN_FILE}"
            )
        if isinstance(link, h5py.SoftLink):
            n_soft += 1
            if n_soft > MAX_SOFT_LINKS:
                raise UserError(f"{_quoted(path)} is a soft link that leads nowhere; {OWN_FILE}")
            here = here.file if link.path.startswith("/") else here
            parts.extendleft(reversed(link.path.split("/")))
        else:
            here = here[part]
    return here


def find_dataset(group: h5py.Group, path: str) -> h5py.Dataset | None:
    """The data set at a path, None where nothing stands. Raises UserError for anything else, and as `require_own`."""
    member = find_member(group, path)
    if member is None:
        return None
    if isinstance(member, h5py.Group):
        raise UserError(f"{_quoted(path)} is a group, of {describe(member)}; name one of its data sets")
    if not isinstance(member, h5py.Dataset):
        raise UserError(f"{_quoted(path)} is no data set")
    require_own(member)
    return member


def is_virtual(dataset: h5py.Dataset) -> bool:
    """Whether its bytes are those of other data sets; asks for nothing that would open them."""
    return bool(dataset.id.get_create_plist().get_layout() == h5py.h5d.VIRTUAL)


def require_own(dataset: h5py.Dataset) -> None:
    """Raise UserError unless every byte of the data set lies in its file, was written and can be unpacked."""
    name, plist = _quoted(str(dataset.name)), dataset.id.get_create_plist()
    if is_virtual(dataset):
        raise UserError(f"{name} is a virtual data set, of other files' bytes, and is not read; {OWN_FILE}")
    if plist.get_external_count():
        file = _quoted(plist.get_external(0)[0].decode(errors="replace"))
        raise UserError(f"{name} has its bytes in another file, {file}, and is not read; {OWN_FILE}")
    for number in range(plist.get_nfilters()):
        code, _, _, about = plist.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise UserError(f"{name} is packed with filter {code} ({shown(str(about))}), which is not here; repack it")
    shape = dataset.shape
    if shape is None:
        raise UserError(f"{name} is empty, without a shape")
    if 0 in shape:
        return
    chunk_bytes = math.prod(dataset.chunks or (1,)) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise UserError(f"{name} has chunks of {chunk_bytes:,} bytes; repack it with smaller ones")
    if dataset.chunks:
        n_chunks = math.prod(-(-n // c) for n, c in zip(shape, dataset.chunks, strict=True))
        if (n_written := dataset.id.get_num_chunks()) < n_chunks:
            raise UserError(
                f"{name} {shape} has {n_written:,} of {n_chunks:,} chunks, the rest was never written; write it whole"
            )
    elif dataset.id.get_storage_size() < math.prod(shape) * dataset.id.get_type().get_size():
        raise UserError(
            f"{name} {shape} has {dataset.id.get_storage_size()} bytes, it was never written; write it whole"
        )


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether a data set of this type holds strings, of a fixed length or not."""
    return h5py.check_string_dtype(dtype) is not None


def read_column(dataset: h5py.Dataset, n_rows: int) -> list[Any]:
    """The numbers or texts of a data set of shape (N,), or (N, 1): one a row. Raises UserError for all else."""
    name, shape, dtype = _quoted(str(dataset.name)), dataset.shape, dataset.dtype
    if not (is_text(dtype) or dtype.kind in "iufb"):
        kind = "references" if h5py.check_ref_dtype(dtype) else str(dtype)
        raise UserError(f"{name} holds {shown(kind)}, not numbers or names")
    if not shape or any(n != 1 for n in shape[1:]):
        one_hot = "; one-hot rows are not read, store the class number" if shape and len(shape) == 2 else ""
        raise UserError(f"{name} has shape {shape}, expected one number or name a row, ({n_rows},){one_hot}")
    if shape[0] != n_rows:
        raise UserError(f"{name} has {shape[0]} rows, expected {n_rows}")
    if not is_text(dtype):
        values = dataset[()].reshape(n_rows)
        return (values.astype(np.float64) if dtype.kind == "f" else values).tolist()
    return _read_texts(dataset, n_rows, name)


def rows_of_any_length(file_nbytes: int) -> int:
    """How many rows of variable length are read at once from a file of so many bytes.

    All of them may name the same bytes, and one may name as many as the file has. So they take `MAX_CHUNK_BYTES` at
    most, or of larger files, in which a call of its own for each row would cost time, `FEWEST_ROWS` times the file.
    """
    fitting = MAX_CHUNK_BYTES // max(1, file_nbytes)
    return min(MOST_ROWS, max(FEWEST_ROWS, fitting))


def _read_texts(dataset: h5py.Dataset, n_rows: int, name: str) -> list[str]:
    is_fixed = dataset.dtype.kind == "S"
    step = (
        max(1, MAX_TEXT_BYTES // max(1, dataset.dtype.itemsize))
        if is_fixed
        else rows_of_any_length(dataset.file.id.get_filesize())
    )
    texts: list[str] = []
    seen: dict[bytes, str] = {}  # the same class many times is one object
    for start in range(0, n_rows, step):
        for raw in dataset[start : start + step].reshape(-1).tolist():
            raw = raw.encode() if isinstance(raw, str) else raw
            if len(raw) > MAX_NAME_BYTES:
                raise UserError(
                    f"{name}, row {len(texts)} has {len(raw):,} bytes, a name may have {MAX_NAME_BYTES:,}; shorten "
                    "it, or name another data set"
                )
            if raw not in seen:
                try:
                    seen[raw] = raw.decode()
                except UnicodeDecodeError:
                    raise UserError(
                        f"{name}, row {len(texts)}: {shown(repr(raw[:40]))} is not UTF-8; save names as UTF-8"
                    ) from None
            texts.append(seen[raw])
    return texts


def describe(group: h5py.Group) -> str:
    """The members of a group in words, without following a link out of the file."""
    listed = []
    names = list(group)
    for name in names[:SHOWN_MEMBERS]:
        try:
            member = find_member(group, name)
            if isinstance(member, h5py.Dataset):
                require_own(member)
            what = "(group)" if isinstance(member, h5py.Group) else f"{member.shape} {member.dtype}"
        except (UserError, AttributeError, RuntimeError, KeyError, OSError, TypeError, ValueError):
            what = "(in another file, or not readable)"
        listed.append(f"{shown(name)[:60]} {what}")
    return (", ".join(listed) or "nothing") + (", …" if len(names) > SHOWN_MEMBERS else "")


def _quoted(text: str) -> str:
    return f"'{shown(text[:200])}'"
