"""How arrays of samples lie on disk, and how to read them: plain Zarr v3 shards, gathered in any order.

Three names are enough to read a store, and one to have latents of what it holds:

    open_store(where)                 what is in a store, and its groups' arrays by rows
    storage.torch.RowDataset(…)       some of its groups as a torch data set, a batch one gather
    iterate_batches(where, groups, …) shuffled batches without torch, in an order that resumes anywhere
    to_latents(moments, …)            latents of stored moments; storage.torch.to_latents does it with tensors

On a store of 1,152 photographs at 128 px, made with the built-in encoders:

    >>> from storage import iterate_batches, open_store
    >>> store = open_store("stores/photos")
    >>> store.groups()
    ['latents/tiny-vae', 'features/tiny-vit']
    >>> features = store.group("features/tiny-vit")
    >>> features.tokens([7, 0]).shape
    (2, 64, 128)
    >>> for batch in iterate_batches("stores/photos", store.groups(), batch=8, seed=0, stop=1):
    ...     print(batch["row"].shape, batch["latents/tiny-vae/moments"].shape)
    (8,) (8, 8, 16, 16)

The examples of the other docstrings are of this store too. Whoever writes needs `create_store`, `create_group`,
`Staging` and `publish_unit`. docs/reading.md has more, and `help(storage.Store)` what is in a store.

Imports numpy, zarr, pyarrow and h5py only; never ray or an encoder library, and torch in `storage.torch` and
`storage.weights` alone, which nothing here imports but functions that read a weight file. A name's module is imported
when the name is first asked for, so that a command's `--help` loads none of them; no module of this package may have
such a name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.any_array import RowReader as RowReader
    from storage.any_array import open_array
    from storage.base.errors import StoreError as StoreError
    from storage.base.errors import UserError as UserError
    from storage.batches import iterate_batches
    from storage.cache import CacheConfig as CacheConfig
    from storage.gather import ArrayReader as ArrayReader
    from storage.gather import gather_into
    from storage.latents import to_latents
    from storage.layout import ArrayLayout as ArrayLayout
    from storage.layout import GroupLayout as GroupLayout
    from storage.layout import StoreLayout as StoreLayout
    from storage.reader import GroupReader as GroupReader
    from storage.reader import Store as Store
    from storage.reader import open_store
    from storage.staging import Staging as Staging
    from storage.writer import Failure as Failure
    from storage.writer import create_group, create_store, publish_unit

# Functions alone, which is what `help` shows and `import *` brings: the classes would stand before them, for 700 lines,
# and are imported from here by name.
__all__ = [
    "create_group",
    "create_store",
    "gather_into",
    "iterate_batches",
    "open_array",
    "open_store",
    "publish_unit",
    "to_latents",
]

_NAMES = {
    "any_array": "RowReader open_array",
    "base.errors": "StoreError UserError",
    "batches": "iterate_batches",
    "cache": "CacheConfig",
    "gather": "ArrayReader gather_into",
    "latents": "to_latents",
    "layout": "ArrayLayout GroupLayout StoreLayout",
    "reader": "GroupReader Store open_store",
    "staging": "Staging",
    "writer": "Failure create_group create_store publish_unit",
}
_MODULE_OF = {name: f"storage.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
