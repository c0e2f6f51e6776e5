"""Where weights are found and how a file of them is read. Nothing is fetched when it is in the hub's cache."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TIMM_FILES = ("model.safetensors", "open_clip_model.safetensors")
WRAPPERS = ("state_dict", "model", "teacher", "encoder", "target_encoder")  # names that checkpoints put around a model


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(given: Path | None, *, name: str, repository: str, original: str) -> Path:
    """The weight file of the vision encoder `name`: the one given, or timm's from the hub. Raises UserError."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"weight file {given} of {name} does not exist; mend --features-weights")
        return given
    take = f"take {original} " if original else "take its file "
    if not repository:
        raise UserError(f"weights of {name} are on no hub; {take}and pass --features-weights FILE")
    try:
        return hub_file(repository, TIMM_FILES[0])
    except LookupError as error:
        raise UserError(
            f"weights of {name} are neither in the Hugging Face cache nor can they be fetched ({error}); on a machine "
            f"with network run `hf download {repository} {TIMM_FILES[0]}` (or {take}as it was released) and pass "
            "--features-weights FILE"
        ) from None


def hub_file(repository: str, filename: str) -> Path:
    """A file of a hub repository: from the cache, else fetched. Raises LookupError naming what went wrong."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(repository, filename, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repository, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LookupError(type(error).__name__) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt or .tar file, unwrapped; pickled code is never run.

    Raises UserError. A TorchScript archive (OpenAI's CLIP) is read through torch's own loader of those, as float32.
    """
    import torch

    if not path.is_file():
        raise UserError(f"weight file {path} does not exist; pass a .safetensors, .pth, .pt or .tar file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch means to replace TorchScript, not these files
                scripted = torch.jit.load(path, map_location="cpu").state_dict()
            return {name: value.float() for name, value in scripted.items()}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise their own kinds for a damaged file
        raise UserError(f"weight file {path} cannot be read: {str(error).splitlines()[0]}") from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise UserError(f"weight file {path} holds a {type(state).__name__}, not a dict of tensors")
    # DistributedDataParallel's prefix
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _is_torchscript(path: Path) -> bool:
    """Zip archives both; TorchScript's holds its constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
