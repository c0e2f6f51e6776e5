"""What holds weights, opened as data: a zip archive, pickles in a row, safetensors.

    zip archive          what torch.save writes; a TorchScript archive too (OpenAI's CLIP), but for its code
    pickles in a row     what torch.save wrote before 1.6
    safetensors

A storage lies within its record, and nothing is inflated. A pickle that names anything but tensors and plain values is
refused (`unpickle.py`).
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from storage.base.shown import shown
from storage.weights.tensors import DamagedError, Storage, Stored, bytes_of, is_count, product, size_of
from storage.weights.unpickle import Named, Unpickled

MAX_PICKLE_BYTES = 8 << 20  # SiT-XL with its optimiser's state has 0.3 MB
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip's or safetensors' list of records
CHUNK = 16 << 20
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before 1.6
NAMED_AT_MOST = 4
DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
}
STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
# What training scripts put beside weights (their options, NumPy numbers, dates). None of it is made, or called.
KNOWN = re.compile(
    r"torch\..*|__torch__\..*|numpy\..*|collections\.\w+|argparse\.Namespace|pathlib\.\w+|datetime\.\w+|_codecs\.encode|"
    r"(builtins|__builtin__)\.(set|frozenset|slice|range|complex|bytearray|bytes|int|float|bool|str|list|dict|tuple)"
)


def read_zip(stack: ExitStack, file: BinaryIO, nbytes: int) -> Any:
    """The tree of an archive of torch.save; its records are read from `file` while `stack` is open."""
    tail = min(nbytes, 65536 + 22 + 76)
    file.seek(nbytes - tail)
    end = file.read(tail)
    for mark, kind, offset in ((b"PK\x05\x06", "<I", 12), (b"PK\x06\x06", "<Q", 40)):
        at = end.rfind(mark)
        if at >= 0 and len(end) >= at + offset + 8:
            (declared,) = struct.unpack_from(kind, end, at + offset)
            if declared != 0xFFFFFFFF and declared > MAX_DIRECTORY_BYTES:
                raise DamagedError(
                    f"its list of records has {declared:,} bytes, at most {MAX_DIRECTORY_BYTES:,} are read"
                )
    archive = stack.enter_context(zipfile.ZipFile(file))
    records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
    if len(pickles) != 1:
        raise DamagedError(f"it is a zip with {len(pickles)} records data.pkl where torch.save writes one")
    prefix = pickles[0].removesuffix("data.pkl")
    order = _record(archive, records, f"{prefix}byteorder", 16) if f"{prefix}byteorder" in records else b"little"
    if order.decode("ascii", "replace") != sys.byteorder:
        raise DamagedError("its numbers are in another byte order than this machine's; save it again on such a machine")

    last: dict[str, bytearray] = {}

    def read(name: str) -> bytearray:
        if name not in last:
            last.clear()
            last[name] = _record(archive, records, name, nbytes)
        return last[name]

    def persistent(persistent_id: Any) -> Storage:
        kind, key, n = _storage_id(persistent_id)
        name = f"{prefix}data/{key}"
        if name not in records:
            raise DamagedError(f"it has no record {shown(name[:80])}")
        storage = Storage(name, kind, n, lambda: read(name))
        if bytes_of(storage) > records[name].file_size:
            raise DamagedError(
                f"record {shown(name[:80])} has {records[name].file_size:,} bytes of {bytes_of(storage):,}"
            )
        return storage

    return _tree(io.BytesIO(_record(archive, records, pickles[0], MAX_PICKLE_BYTES)), persistent)


def _record(archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], name: str, limit: int) -> bytearray:
    """A record's bytes, as they lie there: torch compresses none of those that are read here."""
    info = records[name]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise DamagedError(f"record {shown(name[:80])} is compressed, which torch.save never does; save it again")
    if info.file_size > limit:
        raise DamagedError(f"record {shown(name[:80])} has {info.file_size:,} bytes, at most {limit:,} are possible")
    content = bytearray(info.file_size)
    with archive.open(info) as record, memoryview(content) as view:
        at = 0
        while n := record.readinto(view[at : at + CHUNK]):  # type: ignore[attr-defined]
            at += n
    if at != len(content):
        raise DamagedError(f"record {shown(name[:80])} is truncated")
    return content


def read_safetensors(stack: ExitStack, path: Path, head: bytes) -> dict[str, Stored]:
    """The tensors of a safetensors file, whose first bytes are `head`, by name."""
    (declared,) = struct.unpack("<Q", head[:8])
    if declared > MAX_DIRECTORY_BYTES:
        raise DamagedError(f"its header has {declared:,} bytes, at most {MAX_DIRECTORY_BYTES:,} are read")
    file = stack.enter_context(safe_open(path, framework="pt"))
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - it is no dict
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        tensors[name] = Stored(shape, product(shape), name, 0, partial(file.get_tensor, name))
    return tensors


def is_safetensors(head: bytes, nbytes: int) -> bool:
    """Whether a file of so many bytes that begins so is safetensors."""
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= nbytes - 8


def read_pickles(file: BinaryIO, nbytes: int) -> Any:
    """The format before 1.6: magic number, version, system, the object, the storages' keys; then their bytes."""
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    asked: dict[str, Storage] = {}
    places: dict[str, int] = {}

    last: dict[str, bytearray] = {}

    def read(key: str, n: int) -> bytearray:
        if key not in last:
            last.clear()
            last[key] = _run(file, places[key], n)
        return last[key]

    def persistent(persistent_id: Any) -> Storage:
        kind, key, n = _storage_id(persistent_id)
        if len(persistent_id) > 5 and persistent_id[5] is not None:
            raise DamagedError("it has views of storages, as only torch before 0.4 wrote; save it again")
        return asked.setdefault(key, Storage(key, kind, n, lambda: read(key, n * size_of(kind))))

    def no_storage(persistent_id: Any) -> Any:
        raise DamagedError("it has a storage where none may stand")

    try:
        magic = Unpickled(pickles, no_storage).value
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError("it is neither what torch.save writes nor safetensors") from error
    if magic != MAGIC:
        raise DamagedError("it is a pickle that torch.save did not write")
    _, system = (Unpickled(pickles, no_storage).value for _ in range(2))
    if not isinstance(system, dict) or bool(system.get("little_endian", True)) != (sys.byteorder == "little"):
        raise DamagedError("its numbers are in another byte order than this machine's; save it again on such a machine")
    tree = _tree(pickles, persistent)
    keys = Unpickled(pickles, no_storage).value
    if not isinstance(keys, list) or {str(key) for key in keys} != asked.keys():
        raise DamagedError("its list of storages does not fit its tensors")
    at = pickles.tell()
    for key in keys:
        file.seek(at)
        (n,) = struct.unpack("<q", _run(file, at, 8))
        storage = asked[str(key)]
        if n != storage.n or at + 8 + bytes_of(storage) > nbytes:
            raise DamagedError(f"storage {shown(str(key)[:80])} is truncated")
        places[str(key)] = at + 8
        at += 8 + bytes_of(storage)
    return tree


def _run(file: BinaryIO, at: int, n: int) -> bytearray:
    file.seek(at)
    content = bytearray(n)
    if file.readinto(content) != n:  # type: ignore[attr-defined]
        raise DamagedError("it is truncated")
    return content


def _storage_id(persistent_id: Any) -> tuple[torch.dtype | None, str, int]:
    """dtype, key and length of ("storage", type, key, device, length, …)."""
    if not (
        isinstance(persistent_id, tuple)
        and len(persistent_id) >= 5
        and persistent_id[0] == "storage"
        and isinstance(persistent_id[1], Named)
    ):
        raise DamagedError("a storage of it is named in no way that torch does")
    kind = STORAGE.fullmatch(persistent_id[1].name) or re.fullmatch(
        r"torch\.storage\.(Untyped)Storage", persistent_id[1].name
    )
    if kind is None or kind[1] not in {*DTYPES, "Untyped"}:
        raise DamagedError(f"it has a {shown(persistent_id[1].name[:80])}, which is not read")
    key, n = persistent_id[2], persistent_id[4]
    if not isinstance(key, str | int) or not is_count(n):
        raise DamagedError("a storage of it is named in no way that torch does")
    return DTYPES.get(kind[1]), str(key), n


def _tree(pickle: io.BytesIO, persistent: Callable[[Any], Storage]) -> Any:
    """The object of a pickle that names nothing strange."""
    unpickled = Unpickled(pickle, persistent)
    strange = sorted(name for name in unpickled.names if not KNOWN.fullmatch(name))
    if strange:
        more = f" and {len(strange) - NAMED_AT_MOST} more" if len(strange) > NAMED_AT_MOST else ""
        names = ", ".join(shown(name[:80]) for name in strange[:NAMED_AT_MOST])
        raise DamagedError(
            f"it holds more than tensors and plain values: {names}{more}; none of it was run. Save the weights alone, "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        )
    return unpickled.value
