"""Where weights are found and how a file of them is read. Nothing is fetched when it is in the hub's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.base.errors import UserError
from storage.base.shown import shown

if TYPE_CHECKING:
    from torch import Tensor

TIMM_FILES = ("model.safetensors", "open_clip_model.safetensors")
# names that checkpoints put around a model, as a dict's key or before every weight's name
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "encoder", "target_encoder", "module", "_orig_mod")
PREFIXES = frozenset({"model", "net", "network", "encoder", "backbone"})
MAX_WRAPPERS = 8
_NOT_FETCHED: dict[tuple[str, str], str] = {}  # (repository, file) → what went wrong


class MissingWeightsError(UserError):
    """Weights that are not at hand: neither named nor cached and, where they may be, not to be fetched."""


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(given: Path | None, *, name: str, repository: str, original: str, fetch: bool = True) -> Path:
    """The weight file of the vision encoder `name`: the one given, or timm's from the hub.

    Raises UserError for a file that is not there, MissingWeightsError where none is at hand.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"weight file {given} of {name} does not exist; mend --features-weights")
        return given
    take = f"take {original} " if original else "take its file "
    if not repository:
        raise MissingWeightsError(f"weights of {name} are on no hub; {take}and pass --features-weights FILE")
    try:
        return hub_file(repository, TIMM_FILES[0], fetch=fetch)
    except LookupError as error:
        raise MissingWeightsError(
            f"weights of {name} are {absent(error, fetch)} "
            f"`hf download {repository} {TIMM_FILES[0]}` (or {take}as it was released) and pass "
            "--features-weights FILE"
        ) from None


def absent(error: LookupError, fetch: bool) -> str:
    """That files of a hub are not at hand, and on which machine they can be had."""
    if not fetch:
        return "not in the Hugging Face cache; a run fetches them and, where it cannot, on a machine with network run"
    return f"neither in the Hugging Face cache nor can they be fetched ({error}); on a machine with network run"


def hub_file(repository: str, filename: str, *, fetch: bool = True) -> Path:
    """A file of a hub repository: from the cache, else fetched. Raises LookupError naming what went wrong.

    A file that could not be fetched is not asked for again by this process: without a network that takes half a minute.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(repository, filename, local_files_only=True))
        except LocalEntryNotFoundError:
            if not fetch:
                raise
            if (repository, filename) in _NOT_FETCHED:
                raise LookupError(_NOT_FETCHED[repository, filename]) from None
            return Path(hf_hub_download(repository, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if fetch:
            _NOT_FETCHED[repository, filename] = type(error).__name__
        raise LookupError(type(error).__name__) from None


def read_weights(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt or .tar file, unwrapped, under bare names; nothing in it is run.

    With `names`, only what is there of these is read.

    A TorchScript archive (OpenAI's CLIP) gives its tensors as float32. Raises UserError.
    """
    from storage.weights.file import open_weights
    from storage.weights.names import bare, not_a_tensor
    from storage.weights.tensors import Stored

    with open_weights(path) as file:
        entries = bare(file.entries() if file.scripted else _unwrapped(file.tree), path)
        for name, value in entries.items():
            if reason := not_a_tensor(value):
                raise UserError(f"weight file {path} cannot be read: {shown(name[:80])} is {reason}")
        stored = {name: value for name, value in entries.items() if isinstance(value, Stored)}
        while len(shared := {name.partition(".")[0] for name in stored}) == 1 and shared <= PREFIXES:
            stored = {name.partition(".")[2]: value for name, value in stored.items()}
        if not stored:
            kind = shown(file.kind[:80])
            raise UserError(f"weight file {path} cannot be read: it holds a {kind} without tensors by name")
        if names:
            stored = {name: value for name, value in stored.items() if name in names}
        tensors = file.tensors(stored)
        return {name: value.float() for name, value in tensors.items()} if file.scripted else tensors


def _unwrapped(tree: Any) -> dict[str, Any]:
    """The innermost dict below names that checkpoints put around a model."""
    for _ in range(MAX_WRAPPERS):
        below = next((name for name in WRAPPERS if isinstance(tree, dict) and isinstance(tree.get(name), dict)), None)
        if below is None:
            break
        tree = tree[below]
    return {name: value for name, value in tree.items() if isinstance(name, str)} if isinstance(tree, dict) else {}
