"""What the files of a store hold, as types: the one place that says what is believed of what somebody else wrote.

    zarr.json of a group        `GroupNode`, whose attributes are `StoreAttributes` (the root) or `GroupAttributes`
    zarr.json of an array       `ArrayNode`, before zarr-python interprets it
    receipts/…/metadata.json    `MetadataReceipt`
    receipts/…/<unit>.json      `storage.receipts.Receipt`, of the types below
    an identity                 `storage.identity.LatentsIdentity`, `FeaturesIdentity`

Fields that are not named here are kept and not looked at, so a later version may add some. Sizes are bounded here, so
that arithmetic with them neither overflows nor takes memory; whether they agree with each other is for the readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

MAX_ROWS = 2**40
MAX_SAMPLE_BYTES = 1 << 28  # of one view in one array; DINOv2-g at 512 px has 3 MB
MAX_ARRAYS = 64  # of a group

Row = Annotated[int, Field(ge=0, lt=MAX_ROWS)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]  # of an axis of a sample
Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Base64 = Annotated[str, Field(pattern="^[A-Za-z0-9+/]*={0,2}$")]
Name = Annotated[str, Field(max_length=255, pattern=r"^[^/.\x00][^/\x00]*$")]  # of an array: a folder's, not hidden


@with_config(ConfigDict(extra="allow"))
class Source(TypedDict, total=False):
    """Where the images came from; other sources may say more."""

    kind: str
    path: str


@with_config(ConfigDict(extra="allow"))
class Provenance(TypedDict, total=False):
    """What made a group, where that changes no number."""

    weights: str
    decoder: str


@with_config(ConfigDict(extra="allow"))
class Made(TypedDict, total=False):
    """When and by what a unit was made."""

    run: str
    finished_unix_s: FiniteFloat


class PackedSums(TypedDict):
    """`storage.statistics.Sums` as a receipt holds them."""

    count: Annotated[int, Field(ge=1, le=2**53)]
    sum: Base64
    sum_squares: Base64


class PackedBasis(TypedDict):
    """`storage.principal.Basis` as a group's attributes hold it, float64 row by row."""

    mean: Base64
    deviation: Base64
    components: Base64
    eigenvalues: Base64
    total_variance: Base64


class PackedNorm(TypedDict):
    """`storage.final_norm.FinalNorm` as a group's attributes hold it."""

    weight: Base64
    bias: Base64


@dataclass(frozen=True, kw_only=True)
class StoreAttributes:
    """Attributes of a store's root."""

    format_version: int
    n_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    views: tuple[Literal["original"]] | tuple[Literal["original"], Literal["hflip"]]
    resolution: Annotated[int, Field(ge=8, le=2**20)]
    shard_rows: Annotated[int, Field(ge=1, le=2**24)]  # more would make a receipt larger than any is read
    index_digest: str
    source: Source = field(default_factory=Source)


@dataclass(frozen=True, kw_only=True)
class GroupAttributes:
    """Attributes of an encoder's group."""

    format_version: int
    identity: dict[str, Any]  # as it is hashed; `storage.identity` has its types
    identity_digest: Hex
    provenance: Provenance = field(default_factory=Provenance)


@dataclass(frozen=True, kw_only=True)
class GroupNode:
    """`zarr.json` of a group."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArrayNode:
    """`zarr.json` of an array of ours: what is bounded before zarr-python reads the rest of it."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[tuple[Count, ...], Field(min_length=3, max_length=16)]
    data_type: Annotated[str, Field(pattern="^(bool|u?int(8|16|32|64)|float(16|32|64))$")]


@dataclass(frozen=True, kw_only=True)
class MetadataReceipt:
    """SHA-256 (hex) by key of the metadata files of a store or a group."""

    format_version: int
    files: Annotated[dict[str, Hex], Field(max_length=MAX_ARRAYS + 8)]


@dataclass(frozen=True, kw_only=True)
class Version:
    """All that is asked of a file which does not fit this code, to tell another version's from a damaged one."""

    format_version: int
