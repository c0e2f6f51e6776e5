"""`python -m storage`: look at stores without touching them.

ls ROOT      the groups of a store: encoder, shape, dtype, size, how complete
info GROUP   one group (ROOT/latents/NAME or ROOT/features/NAME): identity, provenance, failures, timings
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from storage.console import EXIT_OK, Parser, run_command
from storage.errors import UserError
from storage.layout import GROUP_KINDS
from storage.reader import Store, open_store
from storage.receipts import Failure, scan

PROG = "python -m storage"


def list_groups(store: Store) -> None:
    """Print one line a group."""
    print(f"{store.root}: {store.n_rows} rows, views {', '.join(store.layout.views)}, {store.resolution} px")
    for path in store.groups():
        layout, attributes = store.group_layout(path)
        scanned = list(scan(store.root, layout, attributes["identity_digest"]))
        n_done = sum(reason is None for _, _, reason in scanned)
        n_bytes = sum(
            shard.nbytes for _, receipt, reason in scanned if receipt and reason is None for shard in receipt.shards
        )
        arrays = ", ".join(f"{a.name} {'×'.join(map(str, a.shape))} {a.dtype}" for a in layout.arrays)
        print(f"  {path}  {arrays}  {n_bytes / 1e9:.3f} GB  units {n_done}/{layout.store.n_units}")


def describe_group(store: Store, path: str) -> None:
    """Print identity, provenance, failed samples and where the time went."""
    layout, attributes = store.group_layout(path)
    for heading in ("identity", "provenance"):
        print(heading, json.dumps(attributes.get(heading, {}), indent=2, sort_keys=True), sep="\n")
    print(f"identity digest {attributes['identity_digest']}")
    timings_s: dict[str, float] = {}
    failures: list[Failure] = []
    undone = []
    for unit, receipt, reason in scan(store.root, layout, attributes["identity_digest"]):
        if receipt is None or reason is not None:
            undone.append(f"unit {unit}: {reason}")
            continue
        failures += receipt.failed
        for stage, seconds in receipt.timings_s.items():
            timings_s[stage] = timings_s.get(stage, 0.0) + seconds
    print("seconds, summed over units: " + ", ".join(f"{stage} {s:.1f}" for stage, s in sorted(timings_s.items())))
    print(f"units done {layout.store.n_units - len(undone)}/{layout.store.n_units}", *undone[:20], sep="\n  ")
    print(f"samples failed {len(failures)}", *(f"row {f.row} {f.key}: {f.reason}" for f in failures[:20]), sep="\n  ")


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="the groups of a store").add_argument("root", type=Path)
    commands.add_parser("info", help="one group of a store").add_argument("group", type=Path)
    args = parser.parse_args(argv)
    if args.command == "ls":
        list_groups(open_store(args.root))
        return EXIT_OK
    group: Path = args.group.absolute()
    if group.parent.name not in GROUP_KINDS:
        raise UserError(
            f"a group is STORE/latents/NAME or STORE/features/NAME, got {args.group}; see `{PROG} ls STORE`"
        )
    describe_group(open_store(group.parent.parent), f"{group.parent.name}/{group.name}")
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
