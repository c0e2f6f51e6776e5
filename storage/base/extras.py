"""Which extra of this project brings a package that is not installed, as one line to the user.

A plain install reads stores; what training and encoding need on top is in extras (`pyproject.toml`). So a command may
start and miss a package later.
"""

from __future__ import annotations

from storage.base.errors import UserError
from storage.base.programs import package_named

MODULES = {  # that an extra brings, as they are imported
    "train": "PIL safetensors tensorboard torch yaml",
    "evaluate": "diffusers h5py huggingface_hub timm torch_fidelity torchvision",
    "precompute": "PIL diffusers fsspec h5py huggingface_hub matplotlib ray safetensors skimage sklearn timm torch "
    "torchvision",
    "rae": "transformers",
}
PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # named otherwise
EXTRAS_OF = {  # a package, in the order in which its user is likely to want them
    "storage": ("train", "precompute"),
    "pipeline": ("precompute", "train", "evaluate", "rae"),
    "trainer": ("train", "evaluate"),
}


def package_of(module: str) -> str:
    """What installs a module."""
    return PACKAGES.get(module, module.replace("_", "-"))


def how_to_install(extra: str) -> str:
    """In words, for whoever lacks a package of an extra."""
    return f"pip install '.[{extra}]' in this project's folder"


def what_to_install(error: ModuleNotFoundError, prog: str) -> UserError | None:
    """The error for a package that the command `prog` lacks, None where the missing module is of no extra."""
    module = (error.name or "").partition(".")[0]
    for extra in EXTRAS_OF.get(package_named(prog), tuple(MODULES)):
        if module in MODULES[extra].split():
            return UserError(f"this needs the package {package_of(module)}; {how_to_install(extra)}")
    return None
