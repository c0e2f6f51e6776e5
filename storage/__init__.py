"""How arrays of samples lie on disk: plain Zarr v3 shards, published atomically and gathered in any order.

Imports numpy, zarr, pyarrow and h5py only; never torch, ray or an encoder library. A trainer needs `open_store`; a
writer needs `create_store`, `create_group`, `Staging` and `publish_unit`.
"""

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
