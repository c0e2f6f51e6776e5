"""`python -m storage info`: what a store or a group is, a short table for a person, or all of it as JSON (`--json`).

Everything is read from metadata and receipts. Cost: a small file a unit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage.base.console import say
from storage.base.ending import command, rows, say_next
from storage.base.shown import LONGEST
from storage.base.waiting import waiting
from storage.inspection import codec_spelling, split_group
from storage.metadata import group_identity
from storage.reader import Store
from storage.receipts import Receipt, scan
from storage.samples import REDO
from storage.space import size
from storage.statistics import add_up, describe

if TYPE_CHECKING:
    from storage.commands import InfoConfig

SHOWN = 20  # undone units, failed samples
SHORT = 12  # digits of a digest


def info(config: InfoConfig) -> None:
    """Describe a store and its groups, or one group."""
    store, path = split_group(config.store)
    about: dict[str, Any] = {} if path else {"store": str(store.root), "attributes": dict(store.attributes)}
    if not config.json and not path:
        say(*store_lines(store))
    groups = []
    for name in [path] if path else store.groups():
        with waiting("reading receipts"):
            groups.append(about_group(store, name))
        if not config.json:
            say("", *group_lines(groups[-1]))
    if config.json:
        print(json.dumps(groups[0] if path else {**about, "groups": groups}, indent=1))
    else:
        say_next(
            command("storage", "verify", config.store, "--deep"), command("storage", "info", config.store, "--json")
        )


def store_lines(store: Store) -> list[str]:
    """What all groups share: samples, views, resolution, where the images came from."""
    layout, source = store.layout, store.attributes.get("source") or {}
    table = {
        "store": str(store.root),
        "samples": f"{store.n_rows:,}, views {', '.join(layout.views)}, {store.resolution} px",
        "source": " ".join(_cut(value) for value in source.values()),
        "units": f"{layout.n_units:,} of {layout.shard_rows} rows",
        "index": str(store.attributes.get("index_digest", ""))[:SHORT],
        "groups": ", ".join(store.groups()) or "none yet",
    }
    return rows({name: value for name, value in table.items() if value}).splitlines()


@dataclass
class _Tally:
    """What the receipts of a group's units say, summed up as they pass by."""

    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    undone: dict[int, str] = field(default_factory=dict)
    n_bytes: int = 0
    n_of_unknown: int = 0
    n_redone: int = 0

    def passing(self, units: Iterable[tuple[int, Receipt | None, str | None]]) -> Iterator[Receipt]:
        """The receipts of units that are done, of what `scan` tells, each counted."""
        for unit, receipt, reason in units:
            if receipt is None or reason is not None:
                self.undone[unit] = str(reason)
                continue
            self.n_bytes += sum(shard.nbytes for shard in receipt.shards)
            self.n_of_unknown += not receipt.sample_crc32c
            self.n_redone += "replaces" in receipt.made
            self.failed += [{"row": each.row, "key": each.key, "reason": each.reason} for each in receipt.failed]
            for stage, s in receipt.timings_s.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + s
            yield receipt


def about_group(store: Store, path: str) -> dict[str, Any]:
    """Identity, provenance, what is done, what failed, and where the time went, as JSON has it."""
    layout, attributes = store.group_layout(path)
    identity = group_identity(path, attributes["identity"], store.root.at(path))
    tally = _Tally()
    units = scan(store.root, layout, attributes["identity_digest"])
    sums, n_without = add_up(layout, tally.passing(units), identity)
    return {
        "group": path,
        "at": store.root.at(path),
        "identity": attributes["identity"],
        "identity_digest": attributes["identity_digest"],
        "provenance": attributes.get("provenance", {}),
        "codec": codec_spelling(identity),
        "arrays": {array.name: {"shape": list(array.shape), "dtype": array.dtype} for array in layout.arrays},
        "bytes": tally.n_bytes,
        "bytes_per_image": layout.sample_bytes,
        "units": layout.store.n_units,
        "units_undone": tally.undone,
        "units_without_checksums_of_images": tally.n_of_unknown,
        "units_done_again": tally.n_redone,
        "units_without_statistics": n_without,
        "statistics": describe(sums, identity),
        "failed": tally.failed,
        "seconds": tally.seconds,
    }


def group_lines(about: Mapping[str, Any]) -> list[str]:
    """The same for a person: what made the numbers and how they are stored; then what is odd, a line each."""
    identity, provenance = about["identity"], about["provenance"]
    n_done = about["units"] - len(about["units_undone"])
    arrays = ", ".join(
        f"{name} {'×'.join(map(str, array['shape']))} {array['dtype'].lstrip('<|')}"
        for name, array in about["arrays"].items()
    )
    table = {
        "group": about["at"],
        "encoder": _cut(identity.get("encoder") or "?"),
        "weights": " ".join(
            filter(None, (str(identity.get("weights_sha256") or "")[:SHORT], _cut(provenance.get("weights") or "")))
        ),
        "layer": _cut(identity.get("layer") or ""),
        "pixels": _cut(identity.get("preprocessing") or ""),
        "latents": _normalised(identity),
        "arithmetic": _cut(identity.get("arithmetic") or ""),
        "derived": _compact(identity.get("derived_from")),
        "stored": f"{about['codec']}: {arrays}",
        "bytes": f"an image {about['bytes_per_image']:,}, {size(about['bytes'])} in all",
        "units": f"{n_done}/{about['units']} done",
        "samples": f"{len(about['failed'])} failed",
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in sorted(about["seconds"].items())),
        "digest": about["identity_digest"][:SHORT],
    }
    lines = rows({name: value for name, value in table.items() if value}).splitlines()
    lines += [f"  {line}" for line in about["statistics"]]
    if about["units_without_statistics"]:
        lines.append(f"statistics are of the other units: {about['units_without_statistics']} were written without")
    if about["units_without_checksums_of_images"]:
        lines.append(
            f"{about['units_without_checksums_of_images']} units have no checksums of their images (imported, or older "
            "than these): whether their rows are of the same images as those of other groups is not known"
        )
    if about["units_done_again"]:
        lines.append(f"{about['units_done_again']} units were done again after images that had failed were mended")
    lines += _first([f"unit {unit}: {reason}" for unit, reason in about["units_undone"].items()])
    lines += _first([f"row {each['row']} {each['key']}: {each['reason']}" for each in about["failed"]])
    if about["failed"]:
        lines.append(f"  {REDO}" + (", then derive this group again" if identity.get("derived_from") else ""))
    return lines


def _normalised(identity: Mapping[str, Any]) -> str:
    """How latents are made numbers to train on."""
    if identity.get("latent_normalisation"):
        return "normalised channel by channel"
    factors = {name: identity.get(f"latent_{name}_factor") for name in ("scale", "shift")}
    return ", ".join(f"{name} {_cut(value)}" for name, value in factors.items() if value is not None)


def _compact(value: Any) -> str:
    """`name value, name value` of a mapping, with those inside it dotted."""
    if not isinstance(value, Mapping):
        return _cut(value) if value else ""
    leaves: dict[str, Any] = {}
    for name, each in value.items():
        leaves |= {f"{name}.{k}": v for k, v in each.items()} if isinstance(each, Mapping) else {name: each}
    return ", ".join(f"{name} {_cut(each)[:SHORT]}" for name, each in leaves.items())


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _first(lines: list[str]) -> list[str]:
    """The first of them, indented."""
    more = [f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in [*lines[:SHOWN], *more]]
