"""What `ls`, `verify` and `diff` print. The exit status of a check is 1 where something is wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from storage.base.console import EXIT_FAILED, EXIT_OK, progress_bar, say
from storage.base.ending import command, say_next
from storage.base.errors import StoreError
from storage.base.shown import counted, shown
from storage.base.waiting import waited
from storage.codecs import codec_of
from storage.diff import diff_groups, diff_stores
from storage.identity import Identity
from storage.layout import GROUP_KINDS, METADATA
from storage.metadata import group_identity
from storage.reader import Store, open_store
from storage.receipts import scan
from storage.roots import Root, absolute, open_root
from storage.verify import verify

if TYPE_CHECKING:
    from storage.commands import DiffConfig, ListConfig, VerifyConfig

LEVELS = 3  # folders below ROOT in which `ls` looks for stores


def list_stores(config: ListConfig) -> None:
    """Print every store at or below a place, a line a group. Raises StoreError where none is."""
    where, found = config.root, []
    for name in waited(f"looking for stores in {where}", _stores_below(open_root(where), "", LEVELS)):
        found.append(f"{where.rstrip('/')}/{name}" if name else where)
        try:
            for line in waited("reading receipts", brief_lines(open_store(found[-1]))):
                say(line)
        except StoreError as error:
            if not name:
                raise
            say(str(error))
    if not found:
        open_store(where)  # says what is wrong with it
        raise StoreError(f"{where} holds no store; name the folder that holds one, or a store")
    say_next(command("storage", "info", found[0]), command("storage", "verify", found[0]))


def brief_lines(store: Store) -> Iterator[str]:
    """A line of the store, and one a group."""
    yield f"{store.root}: {store.n_rows} rows, views {', '.join(store.layout.views)}, {store.resolution} px"
    for path in store.groups():
        try:
            layout, attributes = store.group_layout(path)
        except StoreError as error:
            yield f"  {path}  {error}"
            continue
        n_done = n_bytes = 0
        for _, receipt, reason in scan(store.root, layout, attributes["identity_digest"]):
            if receipt is not None and reason is None:
                n_done += 1
                n_bytes += sum(shard.nbytes for shard in receipt.shards)
        arrays = ", ".join(f"{a.name} {'×'.join(map(str, a.shape))} {a.dtype.lstrip('<|')}" for a in layout.arrays)
        identity = group_identity(path, attributes["identity"], store.root.at(path))
        codec = codec_spelling(identity)
        state = "complete" if n_done == layout.store.n_units else f"units {n_done}/{layout.store.n_units}"
        yield f"  {path}  {identity.encoder or '?'}  {codec}  {arrays}  {n_bytes / 1e9:.3f} GB  {state}"


def codec_spelling(identity: Identity) -> str:
    """How a group's numbers are stored, in a word."""
    if identity.codec is None:
        return identity.dtype or "?"
    try:
        return codec_of(identity).spelling
    except StoreError:  # a later version's
        return f"{identity.codec.get('name', '?')} (unknown here)"


def verify_store(config: VerifyConfig) -> int:
    """Print every fault; returns the exit status."""
    where, deep = config.store, config.deep
    root, path = split_path(where)
    groups = [path] if path else None
    total = 0
    with contextlib.suppress(StoreError):  # a fault, named below
        store = open_store(root)
        for name in groups or store.groups():
            with contextlib.suppress(StoreError):
                total += store.group_layout(name)[0].sample_bytes * store.n_rows
    n_faults = 0
    with progress_bar(total, unit="B", description="verify", unit_scale=True, hidden=not deep) as bar:
        faults = verify(root, groups=groups, deep=deep, progress=bar.update)
        for fault in faults if deep else waited("reading receipts", faults):
            n_faults += 1
            bar.write(shown(fault), file=sys.stdout)
            sys.stdout.flush()
    what = "every byte read" if deep else "structure, receipts and shard indexes; --deep reads every byte"
    say(f"{where}: {counted(n_faults, 'fault') if n_faults else 'no faults'} ({what})")
    if deep:
        say_next(command("storage", "info", where))
    else:
        say_next(command("storage", "verify", where, "--deep"))
    return EXIT_FAILED if n_faults else EXIT_OK


def diff(config: DiffConfig) -> int:
    """Print every difference; returns the exit status, 1 when there is one."""
    a, b = config.a, config.b
    (store_a, path_a), (store_b, path_b) = split_group(a), split_group(b)
    if bool(path_a) != bool(path_b):
        raise StoreError(f"compare two stores or two groups, got {a} and {b}")
    lines: Iterator[str] = diff_groups(store_a, path_a, store_b, path_b) if path_a else diff_stores(store_a, store_b)
    equal = True
    for line in waited("comparing receipts", lines):
        equal = False
        say(line)
    if equal:
        say("no difference in samples, identities or rows")
    say_next(command("storage", "verify", b, "--deep") if equal else command("storage", "info", b))
    return EXIT_OK if equal else EXIT_FAILED


def split_group(where: str) -> tuple[Store, str]:
    """The store, and the group's path in it or ""."""
    root, path = split_path(where)
    return open_store(root), path


def split_path(where: str) -> tuple[str, str]:
    """Where the store lies, and the group's path in it or ""."""
    parts = absolute(where).rsplit("/", 2)
    return (parts[0], f"{parts[1]}/{parts[2]}") if len(parts) == 3 and parts[1] in GROUP_KINDS else (where, "")


def _stores_below(root: Root, prefix: str, levels: int) -> Iterator[str]:
    try:
        names = root.children(prefix) if root.path is not None or levels < LEVELS or _lists(root) else [METADATA]
    except PermissionError:  # lost+found, another user's folder
        print(f"{shown(root.at(prefix))} cannot be read and is left out", file=sys.stderr)
        return
    if METADATA in names:
        yield prefix
        return
    for name in names if levels else []:
        if not name.startswith("."):
            yield from _stores_below(root, f"{prefix}/{name}".lstrip("/"), levels - 1)


def _lists(root: Root) -> bool:
    try:
        root.children("")
    except StoreError:
        return False
    return True
