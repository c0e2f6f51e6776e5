"""What one process holds of an array that it reads: open files, threads, and what is known of its shards."""

from __future__ import annotations

import os
from functools import partial
from typing import Literal

from storage.cache import DiskCache
from storage.checks import ChecksumPolicy, ChunkChecks, sample_at
from storage.layout import ArrayLayout, GroupLayout
from storage.offsets import ChunkOffsets
from storage.roots import Root
from storage.shard import HEAL
from storage.shard_files import LocalFiles, RemoteFiles, ShardFiles
from storage.threads import Threads

EmptyRows = Literal["refuse", "fill"]


class OpenArray:
    """The parts of the engine for one array: where its chunks lie, what reads them, what checks them, who works.

    Of no use after a fork (`pid` says whose it is): locks, threads and files are the parent's.
    """

    def __init__(
        self,
        root: Root,
        group: GroupLayout | None,
        layout: ArrayLayout,
        *,
        path: str,
        checksums: ChecksumPolicy,
        n_threads: int,
        cache: DiskCache | None = None,
        empty: EmptyRows = "refuse",
    ) -> None:
        """`group` is None for an array without receipts; `path` is the array's, below the root."""
        self.pid = os.getpid()
        self.layout, self.empty = layout, empty
        self.why_empty = (
            "its sample failed"
            if group is not None
            else 'its writer left it out; open the array with empty="fill" if that means zeros'
        )
        self.sample_at = partial(sample_at, root, path, layout)
        self.threads = Threads(n_threads, f"gather-{layout.name}")
        self.checks = ChunkChecks(checksums, root, group, layout, path)
        self.files: ShardFiles
        if root.path is not None:
            self.files = LocalFiles(root.path, path, layout)
        else:
            self.files = RemoteFiles(root, path, layout, cache, self.checks.crcs)
        self.offsets = ChunkOffsets(
            layout,
            self.files,
            self.threads,
            if_missing=None if empty == "fill" else self.why_empty if group is None else HEAL,
            # An object may be replaced between two reads, when what failed in it is mended.
            on_irregular=(lambda unit: None) if self.files.by_bytes else self.checks.each_time.add,
        )

    def close(self) -> None:
        """Stop the threads and close every file."""
        self.threads.close()
        self.files.close()
