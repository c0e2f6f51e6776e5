"""A file of weights that somebody else wrote, read as data: nothing in it is run, whatever it is called.

    zip archive          what torch.save writes; a TorchScript archive too (OpenAI's CLIP), but for its code
    pickles in a row     what torch.save wrote before 1.6
    safetensors

The tree of a file is what its pickle would build (`unpickle.py`): nested dicts, whose tensors are `Stored`, read when
they are asked for. A pickle that names anything but tensors and plain values is refused. A tensor lies within its
storage and a storage within its record, so that what a file declares costs no more memory than the file has bytes, but
for the conversion to float32. torch is needed, and nothing else of `storage` imports this module.
"""

from __future__ import annotations

import io
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.boundary import open_regular, shown
from storage.errors import UserError
from storage.unpickle import Made, Named, Unpickled

MAX_PICKLE_BYTES = 8 << 20  # SiT-XL with its optimiser's state has 0.3 MB
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip's or safetensors' list of records
MAX_ENTRIES = 200_000
MAX_TIMES_FILE = 8  # bytes of all tensors taken, in units of the file's: names may share storages, halves double
MAX_DEPTH = 16
CHUNK = 16 << 20
SCRIPTED = "__torch__."  # the module of TorchScript's classes
NAMED_AT_MOST = 4
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before 1.6
WRAPPING = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
}
STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
REBUILT = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
OF_A_TYPE = "torch._tensor._rebuild_from_type_v2"
PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
# What training scripts put beside weights (their options, NumPy numbers, dates). None of it is made, or called.
KNOWN = re.compile(
    r"torch\..*|__torch__\..*|numpy\..*|collections\.\w+|argparse\.Namespace|pathlib\.\w+|datetime\.\w+|_codecs\.encode|"
    r"(builtins|__builtin__)\.(set|frozenset|slice|range|complex|bytearray|bytes|int|float|bool|str|list|dict|tuple)"
)


class _DamagedError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class _Storage:
    """One flat run of numbers: its dtype (None: bytes), how many of them there are, and what reads their bytes."""

    name: str
    dtype: torch.dtype | None
    n: int
    read: Callable[[], bytearray]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    nbytes: int
    storage: str  # where it lies, beside others perhaps
    storage_nbytes: int  # what is read of the file for it
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightFile:
    """An open file: its tree, and its tensors by name."""

    path: Path
    nbytes: int
    tree: Any
    kind: str  # the class of the object that the file holds

    @property
    def scripted(self) -> bool:
        """Whether it is a TorchScript archive."""
        return self.kind.startswith(SCRIPTED)

    def entries(self) -> dict[str, Any]:
        """Every leaf of the tree's dicts by its names joined with dots. Raises UserError."""
        found: dict[str, Any] = {}
        n_visited = 0

        def descend(tree: Mapping[Any, Any], prefix: str, depth: int) -> None:
            nonlocal n_visited
            for key, value in tree.items():
                n_visited += 1  # not what is found: dicts that share empty ones multiply without an entry
                if n_visited > MAX_ENTRIES:
                    raise _DamagedError(f"it has more than {MAX_ENTRIES:,} entries, too many for weights")
                name = f"{prefix}{key}" if isinstance(key, str | int) else f"{prefix}{type(key).__name__}"
                below = _below(value)
                if below is not None and depth < MAX_DEPTH:
                    descend(below, f"{name}.", depth + 1)
                else:
                    found[name] = value

        with _one_line(self.path):
            descend(_below(self.tree) or {}, "", 1)
        return found

    def tensors(self, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        """The tensors, in memory. Raises UserError when they are damaged, or larger than the file."""
        total = sum(max(item.nbytes, 4 * _product(item.shape)) for item in stored.values())
        n_read = sum({item.storage: item.storage_nbytes for item in stored.values()}.values())
        if max(total, n_read) > MAX_TIMES_FILE * self.nbytes:
            raise UserError(
                f"{shown(str(self.path))} has {self.nbytes:,} bytes and declares tensors of {max(total, n_read):,}; it "
                "is damaged or crafted"
            )
        with _one_line(self.path):
            # Those of one storage one after another, so that it is read once.
            read = {name: stored[name].read() for name in sorted(stored, key=lambda name: stored[name].storage)}
        return {name: read[name] for name in stored}


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open a file of weights. Raises UserError in one line; of a folder it says what to do."""
    if path.is_dir():
        raise UserError(f"{shown(str(path))} is a folder, not a file of weights; {_of_folder(path)}")
    with ExitStack() as stack:
        with _one_line(path):
            try:
                file = stack.enter_context(open(open_regular(path), "rb"))
            except FileNotFoundError:
                raise UserError(f"{shown(str(path))} does not exist; name a file of weights") from None
            nbytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(9)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":
                tree = _read_zip(stack, file, nbytes)
            elif _is_safetensors(head, nbytes):
                tree = _read_safetensors(stack, path, head)
            else:
                tree = _read_pickles(file, nbytes)
            kind = tree.of if isinstance(tree, Made) else type(tree).__name__
            tree = _with_tensors(tree, {})
        yield WeightFile(path, nbytes, tree, kind)


def bare_name(name: str) -> str:
    """A weight's name without what DistributedDataParallel, torch.compile, FSDP and their like put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPING)


def bare(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Entries under their bare names. Raises UserError where two have the same."""
    found: dict[str, Any] = {}
    full: dict[str, str] = {}
    for name, value in entries.items():
        short = bare_name(name)
        if short in found:
            raise UserError(
                f"{shown(str(path))} has {shown(full[short][:80])} and {shown(name[:80])}, one weight twice; keep one"
            )
        found[short], full[short] = value, name
    return found


def not_a_tensor(value: Any) -> str:
    """What an entry is that should have been a tensor, and what to do about it; empty for plain values."""
    if not isinstance(value, Made):
        return ""
    if "ShardedTensor" in (kind := _kind(value)) or "DTensor" in kind:
        return f"a {kind}, one rank's part of it; gather the whole state dict before it is saved (full_state_dict=True)"
    if value.of.startswith("numpy."):
        return "a NumPy array or number; save torch.from_numpy(…) of it"
    if "rebuild" in value.of and "tensor" in value.of.lower():
        return f"a {kind}; save it as an ordinary dense tensor"
    return ""


@contextmanager
def plain_folder(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A diffusers folder whose first weight file of `names` has bare names: itself, or a copy for the time being.

    Raises UserError.
    """
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        yield folder
        return
    with open_weights(file) as weights:
        entries = {name: value for name, value in weights.entries().items() if isinstance(value, Stored)}
        plain = bare(entries, file)
        if plain.keys() == entries.keys():
            tensors = None
        else:
            tensors = {name: tensor.contiguous() for name, tensor in weights.tensors(plain).items()}
    if tensors is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        shutil.copyfile(folder / "config.json", Path(copy) / "config.json")
        save_file(tensors, Path(copy) / "diffusion_pytorch_model.safetensors")
        yield Path(copy)


def _below(value: Any) -> Mapping[Any, Any] | None:
    """What a dict, or a TorchScript module, holds by name."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Made) and value.of.startswith(SCRIPTED) and isinstance(value.state, dict):
        return value.state
    return None


def _read_zip(stack: ExitStack, file: BinaryIO, nbytes: int) -> Any:
    tail = min(nbytes, 65536 + 22 + 76)
    file.seek(nbytes - tail)
    end = file.read(tail)
    for mark, kind, offset in ((b"PK\x05\x06", "<I", 12), (b"PK\x06\x06", "<Q", 40)):
        at = end.rfind(mark)
        if at >= 0 and len(end) >= at + offset + 8:
            (declared,) = struct.unpack_from(kind, end, at + offset)
            if declared != 0xFFFFFFFF and declared > MAX_DIRECTORY_BYTES:
                raise _DamagedError(
                    f"its list of records has {declared:,} bytes, at most {MAX_DIRECTORY_BYTES:,} are read"
                )
    archive = stack.enter_context(zipfile.ZipFile(file))
    records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
    if len(pickles) != 1:
        raise _DamagedError(f"it is a zip with {len(pickles)} records data.pkl where torch.save writes one")
    prefix = pickles[0].removesuffix("data.pkl")
    order = _record(archive, records, f"{prefix}byteorder", 16) if f"{prefix}byteorder" in records else b"little"
    if order.decode("ascii", "replace") != sys.byteorder:
        raise _DamagedError(
            "its numbers are in another byte order than this machine's; save it again on such a machine"
        )

    last: dict[str, bytearray] = {}

    def read(name: str) -> bytearray:
        if name not in last:
            last.clear()
            last[name] = _record(archive, records, name, nbytes)
        return last[name]

    def persistent(found: Any) -> _Storage:
        kind, key, n = _storage_id(found)
        name = f"{prefix}data/{key}"
        if name not in records:
            raise _DamagedError(f"it has no record {shown(name[:80])}")
        storage = _Storage(name, kind, n, lambda: read(name))
        if _bytes_of(storage) > records[name].file_size:
            raise _DamagedError(
                f"record {shown(name[:80])} has {records[name].file_size:,} bytes of {_bytes_of(storage):,}"
            )
        return storage

    return _tree(io.BytesIO(_record(archive, records, pickles[0], MAX_PICKLE_BYTES)), persistent)


def _record(archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], name: str, limit: int) -> bytearray:
    """A record's bytes, as they lie there: torch compresses none of those that are read here."""
    info = records[name]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise _DamagedError(f"record {shown(name[:80])} is compressed, which torch.save never does; save it again")
    if info.file_size > limit:
        raise _DamagedError(f"record {shown(name[:80])} has {info.file_size:,} bytes, at most {limit:,} are possible")
    content = bytearray(info.file_size)
    with archive.open(info) as record, memoryview(content) as view:
        at = 0
        while n := record.readinto(view[at : at + CHUNK]):  # type: ignore[attr-defined]
            at += n
    if at != len(content):
        raise _DamagedError(f"record {shown(name[:80])} is truncated")
    return content


def _read_safetensors(stack: ExitStack, path: Path, head: bytes) -> dict[str, Stored]:
    (declared,) = struct.unpack("<Q", head[:8])
    if declared > MAX_DIRECTORY_BYTES:
        raise _DamagedError(f"its header has {declared:,} bytes, at most {MAX_DIRECTORY_BYTES:,} are read")
    file = stack.enter_context(safe_open(path, framework="pt"))
    found = {}
    for name in file.keys():  # noqa: SIM118 - it is no dict
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        found[name] = Stored(shape, _product(shape), name, 0, partial(file.get_tensor, name))
    return found


def _is_safetensors(head: bytes, nbytes: int) -> bool:
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= nbytes - 8


def _read_pickles(file: BinaryIO, nbytes: int) -> Any:
    """The format before 1.6: magic number, version, system, the object, the storages' keys; then their bytes."""
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    asked: dict[str, _Storage] = {}
    places: dict[str, int] = {}

    last: dict[str, bytearray] = {}

    def read(key: str, n: int) -> bytearray:
        if key not in last:
            last.clear()
            last[key] = _run(file, places[key], n)
        return last[key]

    def persistent(found: Any) -> _Storage:
        kind, key, n = _storage_id(found)
        if len(found) > 5 and found[5] is not None:
            raise _DamagedError("it has views of storages, as only torch before 0.4 wrote; save it again")
        return asked.setdefault(key, _Storage(key, kind, n, lambda: read(key, n * _size(kind))))

    def no_storage(found: Any) -> Any:
        raise _DamagedError("it has a storage where none may stand")

    try:
        magic = Unpickled(pickles, no_storage).value
    except (ValueError, LookupError, TypeError) as error:
        raise _DamagedError("it is neither what torch.save writes nor safetensors") from error
    if magic != MAGIC:
        raise _DamagedError("it is a pickle that torch.save did not write")
    _, system = (Unpickled(pickles, no_storage).value for _ in range(2))
    if not isinstance(system, dict) or bool(system.get("little_endian", True)) != (sys.byteorder == "little"):
        raise _DamagedError(
            "its numbers are in another byte order than this machine's; save it again on such a machine"
        )
    tree = _tree(pickles, persistent)
    keys = Unpickled(pickles, no_storage).value
    if not isinstance(keys, list) or {str(key) for key in keys} != asked.keys():
        raise _DamagedError("its list of storages does not fit its tensors")
    at = pickles.tell()
    for key in keys:
        file.seek(at)
        (n,) = struct.unpack("<q", _run(file, at, 8))
        storage = asked[str(key)]
        if n != storage.n or at + 8 + _bytes_of(storage) > nbytes:
            raise _DamagedError(f"storage {shown(str(key)[:80])} is truncated")
        places[str(key)] = at + 8
        at += 8 + _bytes_of(storage)
    return tree


def _run(file: BinaryIO, at: int, n: int) -> bytearray:
    file.seek(at)
    content = bytearray(n)
    if file.readinto(content) != n:  # type: ignore[attr-defined]
        raise _DamagedError("it is truncated")
    return content


def _storage_id(found: Any) -> tuple[torch.dtype | None, str, int]:
    """dtype, key and length of ("storage", type, key, device, length, …)."""
    if not (isinstance(found, tuple) and len(found) >= 5 and found[0] == "storage" and isinstance(found[1], Named)):
        raise _DamagedError("a storage of it is named in no way that torch does")
    kind = STORAGE.fullmatch(found[1].name) or re.fullmatch(r"torch\.storage\.(Untyped)Storage", found[1].name)
    if kind is None or kind[1] not in {*DTYPES, "Untyped"}:
        raise _DamagedError(f"it has a {shown(found[1].name[:80])}, which is not read")
    key, n = found[2], found[4]
    if not isinstance(key, str | int) or not _is_count(n):
        raise _DamagedError("a storage of it is named in no way that torch does")
    return DTYPES.get(kind[1]), str(key), n


def _tree(pickle: io.BytesIO, persistent: Callable[[Any], _Storage]) -> Any:
    """The object of a pickle that names nothing strange."""
    unpickled = Unpickled(pickle, persistent)
    strange = sorted(name for name in unpickled.names if not KNOWN.fullmatch(name))
    if strange:
        more = f" and {len(strange) - NAMED_AT_MOST} more" if len(strange) > NAMED_AT_MOST else ""
        names = ", ".join(shown(name[:80]) for name in strange[:NAMED_AT_MOST])
        raise _DamagedError(
            f"it holds more than tensors and plain values: {names}{more}; none of it was run. Save the weights alone, "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        )
    return unpickled.value


def _with_tensors(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Dicts and TorchScript modules as dicts of `Stored`; lists, which hold no weights, are left as they are."""
    if isinstance(value, Made) and (tensor := _stored(value)) is not None:
        return tensor
    below = _below(value)
    if below is None or depth > MAX_DEPTH:
        return value
    if id(value) not in seen:
        seen[id(value)] = {}  # one that holds itself has nothing below
        seen[id(value)] = {key: _with_tensors(item, seen, depth + 1) for key, item in below.items()}
    return seen[id(value)]


def _stored(made: Made) -> Stored | None:
    """The tensor that a call would rebuild, checked; None for what is none."""
    arguments = made.arguments
    if made.of in PARAMETERS and arguments and isinstance(arguments[0], Made):
        return _stored(arguments[0])
    if made.of == OF_A_TYPE and len(arguments) > 2:
        function, kind, inner = arguments[:3]
        plain = isinstance(kind, Named) and kind.name in PLAIN_TYPES
        if plain and isinstance(function, Named) and isinstance(inner, tuple):
            return _stored(Made(function.name, inner))
        return None
    if made.of not in REBUILT:
        return None
    if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise _DamagedError("a tensor of it has no storage")
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype
    if made.of.endswith("_v3"):
        dtype = _dtype_named(arguments[6] if len(arguments) > 6 else None)
    if dtype is None:
        raise _DamagedError("a tensor of it has no dtype")
    sizes_fit = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
    if not (sizes_fit and all(map(_is_count, (offset, *shape, *strides)))):
        raise _DamagedError("a tensor of it has no shape")
    n, in_storage = _product(shape), _bytes_of(storage) // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if n and (n > in_storage or last >= in_storage):
        raise _DamagedError(f"a tensor of it, {list(shape)[:8]}, reaches beyond its storage of {in_storage:,} numbers")

    def read() -> Tensor:
        if not n:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(storage.read(), dtype=torch.uint8)[: in_storage * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, strides, offset).clone(memory_format=torch.contiguous_format)

    return Stored(shape, n * dtype.itemsize, storage.name, _bytes_of(storage) if n else 0, read)


def _dtype_named(named: Any) -> torch.dtype | None:
    found = getattr(torch, named.name.removeprefix("torch."), None) if isinstance(named, Named) else None
    return found if isinstance(found, torch.dtype) else None


def _size(dtype: torch.dtype | None) -> int:
    return 1 if dtype is None else dtype.itemsize


def _bytes_of(storage: _Storage) -> int:
    return storage.n * _size(storage.dtype)


def _is_count(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**62


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _kind(made: Made) -> str:
    """The class that a call would have made: the first that it was given, or its own name."""
    if made.of == OF_A_TYPE and len(made.arguments) > 1 and isinstance(made.arguments[1], Named):
        return shown(made.arguments[1].name[:80])
    given = next((item.name for item in made.arguments if isinstance(item, Named)), made.of)
    return shown((given if made.of.startswith(("copyreg.", "torch._utils._rebuild_wrapper")) else made.of)[:80])


def _of_folder(path: Path) -> str:
    if (path / ".metadata").is_file():
        return "a distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` makes one"
    there = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"))
    return f"name one in it ({', '.join(map(shown, there[:NAMED_AT_MOST]))})" if there else "name the file itself"


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged file ends in, as one UserError; bytes that are no pickle end in whatever they spell."""
    try:
        yield
    except UserError:
        raise
    except _DamagedError as error:
        raise UserError(f"{shown(str(path))} cannot be read ({error})") from error
    except Exception as error:  # zipfile, pickletools, safetensors and torch each have their own kinds
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()))
        cut = reason if len(reason) <= 200 else f"{reason[: reason.rfind(' ', 0, 200)]} …"
        raise UserError(f"{shown(str(path))} cannot be read, it is damaged or no file of weights ({cut})") from error
