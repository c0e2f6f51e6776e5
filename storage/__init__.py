"""How arrays of samples lie on disk: plain Zarr v3 shards, published atomically and gathered in any order.

Imports numpy, zarr, pyarrow and h5py only; never torch, ray or an encoder library. A trainer needs `open_store`; a
writer needs `create_store`, `create_group`, `Staging` and `publish_unit`. A name's module is imported when the name is
first asked for, so that a command's `--help` loads none of them; no module of this package may have such a name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.base.errors import StoreError, UserError
    from storage.cache import CacheConfig
    from storage.gather import ArrayReader, gather_into
    from storage.layout import ArrayLayout, GroupLayout, StoreLayout
    from storage.reader import GroupReader, RowReader, Store, open_array, open_store
    from storage.staging import Staging
    from storage.writer import Failure, create_group, create_store, publish_unit

__all__ = [
    "ArrayLayout",
    "ArrayReader",
    "CacheConfig",
    "Failure",
    "GroupLayout",
    "GroupReader",
    "RowReader",
    "Staging",
    "Store",
    "StoreError",
    "StoreLayout",
    "UserError",
    "create_group",
    "create_store",
    "gather_into",
    "open_array",
    "open_store",
    "publish_unit",
]

_NAMES = {
    "base.errors": "StoreError UserError",
    "cache": "CacheConfig",
    "gather": "ArrayReader gather_into",
    "layout": "ArrayLayout GroupLayout StoreLayout",
    "reader": "GroupReader RowReader Store open_array open_store",
    "staging": "Staging",
    "writer": "Failure create_group create_store publish_unit",
}
_MODULE_OF = {name: f"storage.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
