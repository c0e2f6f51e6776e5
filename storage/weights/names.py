"""Names of weights without what wrappers put into them, and what stands where a tensor should.

DistributedDataParallel, torch.compile and FSDP prefix the names of what they wrap, in any order and at any depth.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.weights.file import open_weights
from storage.weights.tensors import Stored, kind_of
from storage.weights.unpickle import Made

WRAPPING = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def bare_name(name: str) -> str:
    """A weight's name without what DistributedDataParallel, torch.compile, FSDP and their like put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPING)


def bare(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Entries under their bare names. Raises UserError where two have the same."""
    bare_entries: dict[str, Any] = {}
    full: dict[str, str] = {}
    for name, value in entries.items():
        short = bare_name(name)
        if short in bare_entries:
            raise UserError(
                f"{shown(str(path))} has {shown(full[short][:80])} and {shown(name[:80])}, one weight twice; keep one"
            )
        bare_entries[short], full[short] = value, name
    return bare_entries


def not_a_tensor(value: Any) -> str:
    """What an entry is that should have been a tensor, and what to do about it; empty for plain values."""
    if not isinstance(value, Made):
        return ""
    if "ShardedTensor" in (kind := kind_of(value)) or "DTensor" in kind:
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
