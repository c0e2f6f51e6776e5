"""A file of weights that somebody else wrote, read as data: nothing in it is run, whatever it is called.

The tree of a file is what its pickle would build: nested dicts, whose tensors are `Stored`, read when they are asked
for. All tensors together take no more memory than a few times the file's bytes, the conversion to float32 included.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from storage.base.boundary import open_regular
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.weights.containers import NAMED_AT_MOST, is_safetensors, read_pickles, read_safetensors, read_zip
from storage.weights.tensors import DamagedError, Stored, product, stored
from storage.weights.unpickle import Made

MAX_ENTRIES = 200_000
MAX_TIMES_FILE = 8  # bytes of all tensors taken, in units of the file's: names may share storages, halves double
MAX_DEPTH = 16
SCRIPTED = "__torch__."  # the module of TorchScript's classes


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
        entries: dict[str, Any] = {}
        n_visited = 0

        def descend(tree: Mapping[Any, Any], prefix: str, depth: int) -> None:
            nonlocal n_visited
            for key, value in tree.items():
                n_visited += 1  # not what is found: dicts that share empty ones multiply without an entry
                if n_visited > MAX_ENTRIES:
                    raise DamagedError(f"it has more than {MAX_ENTRIES:,} entries, too many for weights")
                name = f"{prefix}{key}" if isinstance(key, str | int) else f"{prefix}{type(key).__name__}"
                below = _below(value)
                if below is not None and depth < MAX_DEPTH:
                    descend(below, f"{name}.", depth + 1)
                else:
                    entries[name] = value

        with _one_line(self.path):
            descend(_below(self.tree) or {}, "", 1)
        return entries

    def tensors(self, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        """The tensors, in memory. Raises UserError when they are damaged, or larger than the file."""
        total = sum(max(item.nbytes, 4 * product(item.shape)) for item in stored.values())
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
                raise UserError(f"{shown(str(path))} does not exist; name a file of weights or statistics") from None
            nbytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(9)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":
                tree = read_zip(stack, file, nbytes)
            elif is_safetensors(head, nbytes):
                tree = read_safetensors(stack, path, head)
            else:
                tree = read_pickles(file, nbytes)
            kind = tree.of if isinstance(tree, Made) else type(tree).__name__
            tree = _with_tensors(tree, {})
        yield WeightFile(path, nbytes, tree, kind)


def _below(value: Any) -> Mapping[Any, Any] | None:
    """What a dict, or a TorchScript module, holds by name."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Made) and value.of.startswith(SCRIPTED) and isinstance(value.state, dict):
        return value.state
    return None


def _with_tensors(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Dicts and TorchScript modules as dicts of `Stored`; lists, which hold no weights, are left as they are."""
    if isinstance(value, Made) and (tensor := stored(value)) is not None:
        return tensor
    below = _below(value)
    if below is None or depth > MAX_DEPTH:
        return value
    if id(value) not in seen:
        seen[id(value)] = {}  # one that holds itself has nothing below
        seen[id(value)] = {key: _with_tensors(item, seen, depth + 1) for key, item in below.items()}
    return seen[id(value)]


def _of_folder(path: Path) -> str:
    if (path / ".metadata").is_file():
        return "a distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` makes one"
    weight_files = sorted(
        p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    )
    return (
        f"name one in it ({', '.join(map(shown, weight_files[:NAMED_AT_MOST]))})"
        if weight_files
        else "name the file itself"
    )


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged file ends in, as one UserError; bytes that are no pickle end in whatever they spell."""
    try:
        yield
    except UserError:
        raise
    except DamagedError as error:
        raise UserError(f"{shown(str(path))} cannot be read ({error})") from error
    except Exception as error:  # zipfile, pickletools, safetensors and torch each have their own kinds
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()))
        cut = reason if len(reason) <= 200 else f"{reason[: reason.rfind(' ', 0, 200)]} …"
        raise UserError(f"{shown(str(path))} cannot be read, it is damaged or no file of weights ({cut})") from error
